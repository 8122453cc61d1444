"""A place of its own for every test of the command line, and a way to call it in this process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from decomp_bench import targets
from decomp_bench.cli import main
from decomp_bench.cli.making import METHOD


@dataclass
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def toys():
    """Toy targets, each trained once."""
    return {}


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys, toys):
    """Call the command line: `bench("list", "methods")`."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "probe_cli.py").write_text(METHOD.format(name="probe_cli", title="ProbeCli"))
    monkeypatch.setenv("DECOMP_BENCH_METHODS", str(tmp_path / "methods"))
    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    real = targets.load

    def load(uri, device="cpu"):
        if uri not in toys:
            toys[uri] = real(uri, device)
        return toys[uri]

    monkeypatch.setattr(targets, "load", load)

    def call(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, printed.out, printed.err)

    return call
