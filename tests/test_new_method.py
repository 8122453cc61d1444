"""A newcomer's method: one file in a folder, nothing else, and it is listed, trained, scored, drawn and held to the contract."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from decomp_bench import analysis, runs
from decomp_bench.cli import main

ROOT = Path(__file__).resolve().parent.parent
NAME = "tied_topk"
FILE = '''"""A linear autoencoder of each MLP's output: one orthogonally started matrix reads and writes, the k largest |codes| stay."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import nn

from decomp_bench.config import MethodConfig
from decomp_bench.decomposer import Choice, Decomposer, Site, SiteCodes, Slot


class TiedTopKConfig(MethodConfig):
    k: PositiveInt = 4


class TiedTopK(Decomposer):
    name = "tied_topk"
    summary = "tied linear autoencoder of each MLP's output, k largest codes by magnitude"
    Config = TiedTopKConfig
    kind = "autoencoding"
    swept = ("k",)

    def build(self, generator):
        self.directions_of, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for layer in self.layers:
            out = f"{layer}.mlp.out"
            width = self.target.size(out)
            self.sites.append(Site(f"{layer}.basis", layer, (out,), (Slot(out, out),), width))
            self.directions_of[str(layer)] = nn.Parameter(torch.linalg.qr(torch.randn(width, width, generator=generator))[0])
            self.bias[str(layer)] = nn.Parameter(torch.zeros(width))

    def encode(self, inputs, gates=None):
        codes = {}
        for site in self.sites:
            if site.reads[0] in inputs:
                layer = str(site.layer)
                strength = (inputs[site.reads[0]] - self.bias[layer]) @ self.directions_of[layer].T
                if gates is not None:
                    gate = gates[site.name].gate
                else:
                    largest = strength.abs().topk(min(self.choice.k or self.config.k, site.n), -1).indices
                    gate = torch.zeros_like(strength).scatter(-1, largest, 1.0)
                codes[site.name] = SiteCodes(strength, gate)
        return codes

    def decode(self, codes, write, inputs):
        layer = write.split(".")[0]
        return codes[f"{layer}.basis"].value @ self.directions_of[layer] + self.bias[layer]

    def loss(self, batch, progress):
        codes = self.encode(batch.clean)
        errors = [(self.decode(codes, s.reads[0], batch.clean) - batch.clean[s.reads[0]]).square().mean() for s in self.sites]
        return {"reconstruction": torch.stack(errors).sum()}

    def component_sizes(self, site):
        return 2 * site.n

    def constant_size(self, write):
        return self.target.size(write)

    def directions(self, site, slot):
        return self.directions_of[str(site.layer)], self.directions_of[str(site.layer)]

    @property
    def variant(self):
        return f"k={self.config.k}"

    def sweep(self):
        return [Choice(k=k) for k in (1, 3, 6)]
'''
QUICK = ("--set", "eval.tokens=320", "--set", "eval.bootstrap=20", "--set", "method.batch=256")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The newcomer's folder, and runs and cache of this test's own."""
    (tmp_path / "mine").mkdir()
    for variable, place in {"METHODS": "mine", "RUNS": "runs", "CACHE": "cache"}.items():
        monkeypatch.setenv(f"DECOMP_BENCH_{variable}", str(tmp_path / place))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "mine"
    for name in [module for module in sys.modules if module in (f"decomp_bench.methods.{NAME}", "decomp_bench.methods.my_first")]:
        del sys.modules[name]


def bench(capsys, *arguments: str) -> str:
    """What `decomp-bench ARGUMENTS` prints; it must succeed."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    return printed.out


def test_a_method_is_one_file(folder, capsys):
    (folder / f"{NAME}.py").write_text(FILE)
    (listed,) = [row for row in json.loads(bench(capsys, "list", "methods", "--json")) if row["method"] == NAME]
    assert listed["kind"] == "autoencoding"
    assert "default 4" in listed["config"]["k"]

    printed = bench(capsys, "train", NAME, "--target", "toy:resid_mlp2", "--set", "method.steps=150", "--set", "method.k=1,2,4,8", *QUICK)
    assert "next: decomp-bench compare" in printed
    found = runs.all_runs()
    assert [run.status for run in found] == ["done"] * 4
    frame = pd.concat([run.results() for run in found], ignore_index=True)
    assert set(frame["method"]) == {NAME}
    view = analysis.View(x="l0_mlp", y="fvu")
    points = analysis.points(frame, view).data
    trained = points[(points["curve"] == "trained") & (points["protocol"] == "clean") & (points["gates"] == "self")].sort_values("x")
    assert trained["x"].tolist() == pytest.approx([1, 2, 4, 8])
    assert trained["y"].is_monotonic_decreasing
    assert trained["y"].iloc[-1] < 0.2 < trained["y"].iloc[0]

    figure = analysis.pareto(frame, view)
    assert [axes.get_title() for axes in figure.axes] == ["protocol: cascading", "protocol: clean", "protocol: single"]
    for axes in figure.axes:
        drawn = [line for line in axes.get_lines() if NAME.replace("_", " ") in (line.get_gid() or "").replace("_", " ")]
        assert any(sorted(line.get_xdata().tolist()) == pytest.approx([1, 2, 4, 8]) for line in drawn)
    saved = analysis.save(figure, folder.parent / "figure")
    assert saved


def test_the_contract_holds_over_a_new_method_without_an_edit(folder):
    """The project's own contract tests pick it up by name; run here on the toy."""
    (folder / f"{NAME}.py").write_text(FILE)  # its matrices are not contiguous, which a resume must not mind
    options = ["-p", "no:cacheprovider", "-n0", "-rs", "-k", f"{NAME} and toy"]
    command = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / "contract")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.stdout.count(".") > 15 if passed is None else int(passed.group(1)) > 15, done.stdout


def test_what_new_method_writes_trains_and_is_drawn_as_it_is(folder, capsys):
    printed = bench(capsys, "new", "method", "my_first", "--dir", "mine")
    assert "decomp-bench train my_first" in printed
    bench(capsys, "train", "my_first", "--target", "toy:resid_mlp2", "--set", "method.steps=60", "--set", "method.k=2,8", *QUICK)
    frame = pd.concat([run.results() for run in runs.all_runs()], ignore_index=True)
    fvu = frame.query("metric == 'fvu' and layer == 'all' and protocol == 'clean' and curve == 'trained' and gates == 'self'")
    assert len(fvu) == 2
    assert fvu["value"].lt(1).all(), "better than predicting the mean"
    assert analysis.pareto(frame, analysis.View(y="fvu")).axes
