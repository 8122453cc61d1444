"""The matched forms of the comparison: equal parameters, or equal training FLOPs, by the decomposers' own accounting."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import torch

from decomp_bench import experiment, targets
from decomp_bench.config import parse
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.experiment import Options
from decomp_bench.flops import counted
from decomp_bench.registry import method
from decomp_bench.replacement import clean_points
from decomp_bench.training import _flops

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "011_pareto_trained"


@pytest.fixture(scope="module")
def target():
    return targets.load("pydocs-4l")


def trained(target, preset: str):
    """Method, config and decomposer of every trained run; those that differ in the weight of a penalty are built once."""
    made = {}
    for config in experiment.configs(experiment.load(EXPERIMENT, ROOT), Options(preset=preset)):
        kind = method(config.method)
        own = {key: value for key, value in config.method_config.items() if key != "importance"}
        if kind.trainable and (config.method, str(own)) not in made:
            parsed = parse(kind.Config, own, config.method)
            made[config.method, str(own)] = kind(parsed, target, target.layer_tuple("all"), 0)
    return made


def step_of(decomposer: Decomposer) -> float:
    """FLOPs of a training step, on rows without meaning: only their number counts."""
    random, width, rows = torch.Generator().manual_seed(0), decomposer.target.width, decomposer.config.batch
    if decomposer.trains_on == "activations":
        points = [f"{layer}.mlp.{end}" for layer in decomposer.layers for end in ("in", "out")]
        return _flops(decomposer.train(), Batch(clean={point: torch.randn(rows, width, generator=random) for point in points}))
    x = torch.randint(1, 500, (rows, 256), generator=random)
    clean, logits = decomposer.target.clean(x, clean_points(decomposer))
    return _flops(decomposer.train(), Batch(x, torch.full((rows,), 256), torch.arange(rows), clean, logits))


def test_every_trained_checkpoint_has_the_same_number_of_parameters(target):
    sizes = {key: sum(value.numel() for value in one.state_dict().values()) for key, one in trained(target, "params").items()}
    assert {name for name, _ in sizes} > {"clt", "sae", "spd", "transcoder", "vpd"}
    assert max(sizes.values()) < 1.02 * min(sizes.values()), sizes


def test_every_training_takes_the_same_flops(target):
    taken = {key: step_of(one) * one.config.steps for key, one in trained(target, "compute").items()}
    assert len(taken) == 3 * 4 + 2 + 2 + 1  # each k has steps of its own
    assert all(abs(value / mean(taken.values()) - 1) < 0.02 for value in taken.values()), taken


def test_the_matched_forms_have_the_same_methods_at_the_same_sparsities():
    found = experiment.load(EXPERIMENT, ROOT)
    points = {}
    for preset in ("laptop", "params", "compute"):
        configs = experiment.configs(found, Options(preset=preset))
        assert not any(one.eval.sweep for one in configs) or preset == "laptop"
        points[preset] = {(one.method, one.method_config.get("k"), one.method_config.get("importance")) for one in configs}
    assert points["params"] == points["compute"] < points["laptop"]
    assert {name for name, *_ in points["laptop"] - points["params"]} == {"random_directions"}  # the control at one k alone


def test_products_at_active_entries_are_counted():
    table, weights = torch.randn(10, 3, requires_grad=True), torch.rand(5, requires_grad=True)
    index, starts = torch.tensor([0, 3, 3, 9, 1]), torch.tensor([0, 2])

    def bag():
        return torch.nn.functional.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)

    assert counted(bag) == 2 * 5 * 3
    with torch.no_grad():
        assert counted(bag) == 2 * 5 * 3
    assert counted(lambda: torch.randn(4, 6) @ torch.randn(6, 2)) == 2 * 4 * 6 * 2


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="takes MKL's sparse products")
def test_entries_of_a_product_are_counted():
    support = torch.sparse_csr_tensor(torch.tensor([0, 2, 3]), torch.tensor([0, 4, 1]), torch.zeros(3), (2, 5), check_invariants=True)
    assert counted(lambda: torch.sparse.sampled_addmm(support, torch.randn(2, 7), torch.randn(7, 5), beta=0.0)) == 2 * 3 * 7
