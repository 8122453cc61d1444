"""Several seeds of APD in one batched step: the losses and gradients of each alone."""

from __future__ import annotations

import pytest
import torch

from decomp_bench import data, targets
from decomp_bench.config import DataConfig, TrainConfig, parse
from decomp_bench.methods._apd_stack import StackedAPD
from decomp_bench.methods.apd import APD, APDConfig
from decomp_bench.train import Job, train
from tests.methods.test_apd import batch_of
from tests.targets.test_toys import recorded

OPTIONS = {"components": 7, "k": 0.2, "batch": 64, "init_scale": 4.0}


def members(target, count: int = 3, **config) -> list[APD]:
    chosen = parse(APDConfig, {**OPTIONS, **config}, "apd")
    return [APD(chosen, target, tuple(range(target.layers)), seed) for seed in range(count)]


@pytest.mark.parametrize(
    ("uri", "config"),
    [
        ("tms", {}),
        ("tms with the identity layer", {"rank": 1, "schatten": 0.9, "simplicity": 20.0}),
        ("toy:resid_mlp1", {"k": 1.3, "activation": 1.0, "unit_norm": True, "schatten": 0.9, "rank": 3}),
    ],
)
def test_each_one_s_losses_statistics_and_gradients_are_its_own(uri, config):
    target = recorded(4, identity="identity" in uri) if uri.startswith("tms") else targets.load(uri)
    alone, stacked = members(target, **config), members(target, **config)
    batch = batch_of(alone[0], data.source(target, DataConfig()))
    stack = StackedAPD(stacked)
    weights = {name: torch.stack([dict(one.named_parameters())[name].detach() for one in stacked]).requires_grad_()
               for name, _ in stacked[0].named_parameters()}  # fmt: skip
    inputs = stack.prepare(batch, 0.3)
    assert len(inputs["x"]) < len(batch.x) or not uri.startswith("tms")
    terms, statistics = stack.compute(weights, inputs)
    sum(terms.values()).sum().backward()
    for i, one in enumerate(alone):
        expected = one.loss(batch, 0.3)
        sum(expected.values()).backward()
        assert list(terms) == list(expected)
        for name, value in {**expected, **one.step_statistics()}.items():
            torch.testing.assert_close({**terms, **statistics}[name][i], value, rtol=1e-4, atol=1e-7)
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(weights[name].grad[i], parameter.grad, rtol=1e-3, atol=1e-6)


def test_runs_in_a_group_train_as_each_does_without_one(tmp_path, monkeypatch):
    target = targets.load("toy:resid_mlp1")
    source, config = data.source(target, DataConfig()), {"steps": 12, "unit_norm": True, "k": 1.3, "calibration": 128, "warmup": 2}
    group, alone = members(target, **config), members(target, **config)
    train([Job(one, tmp_path / f"group{i}") for i, one in enumerate(group)], source, TrainConfig())
    monkeypatch.setattr(APD, "stackable", lambda self: 0)
    train([Job(one, tmp_path / f"alone{i}") for i, one in enumerate(alone)], source, TrainConfig())
    for one, other in zip(alone, group, strict=True):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert not torch.equal(group[0].threshold, group[1].threshold)
