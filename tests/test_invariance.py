"""What no metric may depend on (METRICS 14): order of components, SPD's gauge, padding.

The batch size is in test_evaluate.py, the planted dictionary that must be recovered in methods/test_dictionary.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from decomp_bench import registry
from decomp_bench.config import EvalConfig, TrainConfig, parse
from decomp_bench.evaluate import evaluate
from decomp_bench.train import Job, train

CONFIG = EvalConfig(tokens=400, bootstrap=10, sweep=False)
SMALL = {"features": 40, "k": 6, "steps": 15, "batch": 256, "calibration": 1024}
SPD = {
    "components": 20,
    "init": "random",
    "gate_hidden": (8,),
    "steps": 8,
    "batch": 8,
    "warmup_faith": 50,
    "gate_bias": 0.1,
    "gate_lr": 2e-2,
}
CASES = {
    "sae topk": ("sae", {**SMALL, "activation": "topk"}),
    "transcoder batchtopk": ("transcoder", {**SMALL, "activation": "batchtopk"}),
    "clt jumprelu": ("clt", {**SMALL, "activation": "jumprelu"}),
    "spd shared": ("spd", {**SPD, "gate": "shared"}),
    "spd scalar": ("spd", {**SPD, "gate": "scalar"}),
}
FLOORS = {"neurons": ("neurons", {"k": 5}), "svd": ("svd", {"k": 5})}


@pytest.fixture(scope="module")
def trained(lm, tmp_path_factory):
    """Decomposers by case, each trained once, with their results."""
    found = {}

    def get(case: str):
        if case not in found:
            decomposer = make(case, *lm, tmp_path_factory.mktemp("trained"))
            found[case] = decomposer, table(decomposer, lm[1])
        return found[case]

    return get


def make(case: str, target, source, folder):
    name, config = (CASES | FLOORS)[case]
    kind = registry.method(name)
    decomposer = kind(parse(kind.Config, config, name), target, tuple(range(target.layers)), 0)
    if decomposer.trainable:
        (outcome,) = train([Job(decomposer, folder)], source, TrainConfig(log_every=10))
        assert outcome.error is None
    return decomposer.eval()


def table(decomposer, source, config=CONFIG):
    (found,) = evaluate([decomposer], source, config)
    columns = ("protocol", "gates", "curve", "variant", "metric", "layer", "site")
    return {tuple(r[c] for c in columns): (r["value"], r["lo"], r["hi"]) for r in found.rows}


def agree(first, second):
    assert first.keys() == second.keys()
    for key, values in first.items():
        assert values == pytest.approx(second[key], rel=1e-4, abs=1e-6, nan_ok=True), key


def changed(decomposer, change):
    """A copy whose state is `change(name, tensor)` of the original's."""
    other = copy.deepcopy(decomposer, {id(decomposer.target): decomposer.target})
    other.load_state_dict({name: change(name, value) for name, value in decomposer.state_dict().items()})
    return other


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_components_does_not_matter(lm, trained, case):
    """Whatever has an entry for each component of a site is permuted along that dimension, with a permutation for each site."""
    decomposer, usual = trained(case)
    orders = {site.name: torch.randperm(site.n, generator=torch.Generator().manual_seed(site.layer + 7)) for site in decomposer.sites}

    def shuffled(name: str, value: torch.Tensor) -> torch.Tensor:
        site = next((s for s in decomposer.sites if s.name.replace(".", "_") in name.split(".")), None)
        if site is None or name.startswith("outputs.") or site.n not in value.shape:
            return value
        assert list(value.shape).count(site.n) == 1, name
        moved.append(name)
        return value.index_select(list(value.shape).index(site.n), orders[site.name])

    moved: list[str] = []
    other = changed(decomposer, shuffled)
    assert len(moved) >= 3 * len(decomposer.sites)
    agree(usual, table(other, lm[1]))


@pytest.mark.parametrize("case", ["spd shared", "spd scalar"])
def test_the_sign_of_a_rank_one_component_does_not_matter(lm, trained, case):
    """(u, v) -> (-u, -v) of half the components. A scalar gate reads u.x, so what it reads changes sign in it too."""
    spd, usual = trained(case)
    sign = lambda n: (torch.arange(n) % 2 * 2 - 1).float()
    flipped: list[str] = []

    def flip(name: str, value: torch.Tensor) -> torch.Tensor:
        if name.endswith(".V"):
            flipped.append(name)
            return value * sign(value.shape[1])
        if name.endswith(".U") or (name.startswith("gates.") and name.endswith("weights.0")):
            return value * sign(value.shape[0]).reshape(-1, *[1] * (value.dim() - 1))
        return value

    other = changed(spd, flip)
    assert len(flipped) == len(spd.sites)
    agree(usual, table(other, lm[1]))


@pytest.mark.parametrize("case", CASES | FLOORS)
def test_padding_does_not_matter(lm, trained, case, tmp_path, monkeypatch):
    """Rows with five more positions of some letter after their end, statistics and ablations measured on such rows too."""
    decomposer, usual = trained(case)
    wide, original = copy.copy(lm[1]), lm[1].batch

    def padded(split, index):
        batch = original(split, index)
        return replace(batch, x=torch.cat([batch.x, torch.full((len(batch.x), 5), 3)], 1))

    wide.batch = padded
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path / "cache"))
    agree(usual, table(decomposer, wide))
    assert list((tmp_path / "cache").rglob("*.npz")), "the bases were measured anew"
