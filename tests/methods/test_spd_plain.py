"""The straightforward implementation that the benchmark of toys measures against computes the same losses and gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from tests.methods.test_spd import a_batch
from tests.methods.test_spd_stack import a_toy, members

FILE = Path(__file__).parents[2] / "experiments" / "027_toy_throughput" / "plain.py"


def test_its_losses_and_gradients_are_ours():
    spec = importlib.util.spec_from_file_location("plain", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    target, source = a_toy()
    (spd,) = members(target, 1, penalty="lp", p=1.0, clip=None)
    plain = module.Plain(spd)
    batch = a_batch(spd, source, range(32))
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    spd.uniforms.draw = lambda *shape, device: torch.rand(shape, generator=ours)
    plain.draw = lambda *shape: torch.rand(shape, generator=theirs)
    found, expected = spd.loss(batch, 0.0), plain.losses(batch.x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
    sum(found.values()).backward()
    sum(expected.values()).backward()
    for name, parameter in spd.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.weights[name].grad, rtol=1e-3, atol=1e-6)
