"""The straightforward implementations that the benchmark measures against compute the same losses and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from decomp_bench import experiment, registry, script
from decomp_bench.config import parse
from tests.methods.test_spd import a_batch
from tests.methods.test_spd_stack import a_toy, members

BENCH = Path(__file__).parents[2] / "experiments" / "027_spd_throughput"


@pytest.fixture(scope="module")
def bench():
    return script._module(experiment.load(str(BENCH)))


def losses_agree(found, expected):
    """Term by term; then the gradients of both are taken."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    sum(found.values()).backward()
    sum(expected.values()).backward()


def test_on_a_toy(bench):
    target, source = a_toy()
    (spd,) = members(target, 1, penalty="lp", p=1.0, clip=None)
    plain = bench.PlainToy(spd)
    batch = a_batch(spd, source, range(32))
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    spd.uniforms.draw = lambda *shape, device: torch.rand(shape, generator=ours)
    plain.draw = lambda *shape: torch.rand(shape, generator=theirs)
    losses_agree(spd.loss(batch, 0.0), plain.losses(batch.x))
    for name, parameter in spd.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.weights[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["spd", "vpd"])
def test_on_a_language_model(bench, lm, gated_lm, name, monkeypatch):
    """With masks between importance and one everywhere, the same positions routed, and the same sources to start from."""
    for target, source in (lm, gated_lm):
        kind = registry.method(name)
        config = {"components": 24, "init": "random", "gate": "shared", "gamma_end": None, "importance": 0.1, "batch": 3}
        config |= {"adversary_warmup": 0.0}
        spd = kind(parse(kind.Config, config, name), target, tuple(range(target.layers)), 0)
        whole = np.flatnonzero(source.rows("train").length == source.rows("train").length.max())[:3]
        batch = a_batch(spd, source, whole)
        assert batch.length is None or bool((batch.length == batch.x.shape[1]).all())
        plain = bench.PlainLM(spd)
        routed = plain.route(*batch.x.shape)
        monkeypatch.setattr("decomp_bench.methods._spd_losses.uniform_subset", lambda *_, routed=routed: routed[:, 1:].flatten(0, 1))
        spd.uniforms.draw = lambda *shape, device: torch.full(shape, 0.5)
        plain.draw = lambda *shape: torch.full(shape, 0.5)
        plain.route = lambda *_, routed=routed: routed
        if name == "vpd":
            spd.adversary.sources.start(torch.Generator().manual_seed(1), target.device)
            places = batch.x.shape[1]
            plain.sources = {key: value[:, :places].clone().requires_grad_() for key, value in spd.adversary.sources.value.items()}
        losses_agree(spd.loss(batch, 0.5), plain.losses(batch.x))
        for key, one in spd.components.items():
            for own, other in zip((one.V, one.U), plain.parts[key], strict=True):
                torch.testing.assert_close(own.grad, other.grad, rtol=2e-3, atol=1e-6)
        for (_, own), other in zip(spd.gates.named_parameters(), plain.gates.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=2e-3, atol=1e-6)
