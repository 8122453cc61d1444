"""Every experiment's smoke preset as typed: a line each, a clear end, nothing left behind, and failures that do not stop the others."""

from __future__ import annotations

import pytest

from decomp_bench import smoke as smoking
from decomp_bench.cli import main

RUNS = "title: T\nruns: [{method: %s}]\npresets: {smoke: {}}\n"
SCRIPT = "title: S\nscript: own.py\nsettings: {n: 1}\npresets: {smoke: {settings: {n: 2}}}\n"
KILLED = "import os\ndef main(settings, folder): os._exit(9)\n"
OWN = "def main(settings, folder):\n    print('said')\n    (folder / 'made.txt').write_text(str(settings['n']))\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two programs of their own, one of which writes nothing, and runs of a method that there is not."""
    for name, config, script in (
        ("001_own", SCRIPT, OWN),
        ("002_idle", SCRIPT, "def main(settings, folder): pass\n"),
        ("003_runs", RUNS % "absent", ""),
    ):
        folder = tmp_path / "experiments" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        (folder / "own.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys, *arguments: str):
    with pytest.raises(SystemExit) as ended:
        main(["experiment", "smoke", *arguments])
    printed = capsys.readouterr()
    return ended.value.code, printed.out.splitlines(), printed.err


def test_each_has_its_line_and_a_failure_does_not_stop_the_others(project, capsys):
    code, lines, error = call(capsys, "--keep", "kept")
    assert (code, len(lines)) == (1, 4)
    assert [line.split()[0] for line in lines[:3]] == ["001_own", "002_idle", "003_runs"]
    assert [line.split()[2] for line in lines[:2]] == ["passed", "it"]
    assert "absent" in lines[2]
    assert lines[3].startswith("1 of 3 experiments passed in ")
    assert "002_idle, 003_runs" in error
    assert (project / "kept" / "results" / "001_own" / "smoke" / "made.txt").read_text() == "2"
    assert "said" in (project / "kept" / "log.txt").read_text()
    assert not (project / "results").exists()


def test_what_passed_leaves_nothing_and_a_folder_in_use_is_refused(project, capsys, monkeypatch, tmp_path):
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    monkeypatch.setattr("tempfile.tempdir", None)
    code, lines, _ = call(capsys, "001")
    assert (code, len(lines)) == (0, 2)
    assert not list((tmp_path / "t").iterdir())
    assert not (project / "results").exists()
    code, _, error = call(capsys, "001", "--keep", str(project))
    assert (code, len(error.strip().splitlines())) == (2, 1)
    assert "name an empty folder" in error


def test_runs_that_fail_and_experiments_without_any_are_failures(project, monkeypatch):
    class Outcome:
        failures: tuple[str, ...] = ()
        frame = None

    monkeypatch.setattr(smoking, "run", lambda found, options: Outcome)
    assert smoking._run(project / "experiments" / "003_runs") == "no run applies to its target"
    Outcome.failures = ("one diverged", "another too")
    assert smoking._run(project / "experiments" / "003_runs") == "one diverged; another too"


def test_a_process_that_is_killed_is_one_line(project, capsys):
    (project / "experiments" / "002_idle" / "own.py").write_text(KILLED)
    code, _, error = call(capsys, "--workers", "1", "--keep", "kept")
    assert (code, len(error.strip().splitlines())) == (1, 1)
    assert "a process was killed after" in error
