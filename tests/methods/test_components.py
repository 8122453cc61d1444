"""Rank-one components and masks: parity with the reference implementation's recorded numbers, and the parts by hand."""

from __future__ import annotations

import math

import pytest
import torch

from decomp_bench.decomposer import SiteCodes
from decomp_bench.methods._components import (
    Components,
    RoutedCodes,
    faithfulness,
    masked_map,
    neuron_components,
    random_components,
    strengths,
    warm_up,
)
from decomp_bench.methods._masks import Uniforms, interpolate, uniform_subset
from tests.golden.recorded import Golden

MAPS = ("a", "b", "c")
CPU = torch.device("cpu")


def test_faithfulness_warm_up_is_the_reference_s():
    golden = Golden("spd_main_faith_warmup")
    weights = {name: golden[f"target.{name}.weight"] for name in MAPS}
    for steps in (0, 1, 3):
        parts = {name: Components(golden[f"param.{name}.V"].clone(), golden[f"param.{name}.U"].clone()) for name in MAPS}
        warm_up(parts, weights, steps, golden.about["lr"], golden.about["weight_decay"])
        golden.agrees(f"out.loss_after{steps}", faithfulness(parts, weights))
        for name in MAPS if steps else ():
            for key in ("V", "U"):
                assert torch.allclose(getattr(parts[name], key), golden[f"out.after{steps}.{name}.{key}"], atol=2e-5)


def a_map(generator_seed: int = 0, n: int = 9):
    generator = torch.Generator().manual_seed(generator_seed)
    weight, bias = torch.randn(5, 6, generator=generator), torch.randn(5, generator=generator)
    return random_components(weight, n, generator), weight, bias, torch.randn(4, 3, 6, generator=generator), generator


def test_the_masked_map_is_its_formula_and_the_target_s_own_where_everything_is_on():
    part, weight, bias, x, generator = a_map()
    mask, delta = torch.rand(4, 3, 9, generator=generator), torch.rand(4, 3, generator=generator)
    remainder = weight - (part.V @ part.U).T
    by_hand = (x @ part.V * mask) @ part.U + delta[..., None] * (x @ remainder.T) + bias
    strength = strengths(x, part.V)
    assert torch.allclose(masked_map(x, SiteCodes(strength, mask, delta), part.U, weight, bias), by_hand, atol=1e-5)
    ones = SiteCodes(strength, torch.ones(4, 3, 9), torch.ones(4, 3))
    assert torch.equal(masked_map(x, ones, part.U, weight, None), x @ weight.T)
    zeros = SiteCodes(strength, torch.zeros(4, 3, 9), None)
    assert torch.equal(masked_map(x, zeros, part.U, weight, bias), bias.expand(4, 3, 5))


@pytest.mark.parametrize("with_delta", [True, False])
def test_routed_rows_equal_masks_of_one_elsewhere_with_all_gradients(with_delta):
    part, weight, bias, x, generator = a_map()
    rows = torch.tensor([0, 3, 4, 10])
    mask = torch.rand(4, 9, generator=generator).requires_grad_()
    delta = torch.rand(4, generator=generator).requires_grad_() if with_delta else None
    x.requires_grad_()
    upstream = torch.randn(4, 3, 5, generator=generator)
    wanted = [x, mask, part.V, part.U] + ([delta] if with_delta else [])

    def routed():
        codes = RoutedCodes(mask, mask, delta, rows)
        codes.strength = strengths(x, part.V, codes)
        return masked_map(x, codes, part.U, weight, bias)

    def dense():
        whole = torch.ones(12, 9).index_copy(0, rows, mask)
        remainder = torch.ones(12).index_copy(0, rows, torch.zeros(4) if delta is None else delta)
        return masked_map(x, SiteCodes(strengths(x, part.V), whole.view(4, 3, 9), remainder.view(4, 3)), part.U, weight, bias)

    assert torch.allclose(routed(), dense(), atol=1e-5)
    for first, second in zip(*(torch.autograd.grad(f(), wanted, upstream) for f in (routed, dense)), strict=True):
        assert torch.allclose(first, second, atol=1e-5)


def test_faithfulness_is_the_mean_squared_remainder():
    part, weight, _, _, _ = a_map()
    other, other_weight, _, _, _ = a_map(1, 4)
    remainders = [(w - (p.V @ p.U).T).square().sum() for p, w in ((part, weight), (other, other_weight))]
    found = faithfulness({"a": part, "b": other}, {"a": weight, "b": other_weight})
    assert torch.allclose(found, sum(remainders) / 60)


@pytest.mark.parametrize("writes", [False, True])
def test_neurons_as_components_give_the_matrix_exactly(writes):
    weight = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7)[:, None]
    part = neuron_components(weight, 9, writes, torch.Generator().manual_seed(1))
    assert torch.equal((part.V @ part.U).T, weight)
    V, U = part.V.norm(dim=0)[:7], part.U.norm(dim=1)[:7]
    assert ((V / U).log2().abs() <= 1 + 1e-5).all()
    vectors = weight.T if writes else weight
    rank_one = part.V[:, 3, None] @ part.U[None, 3]
    neuron = torch.zeros(7)
    neuron[3] = 1
    assert torch.equal(rank_one, torch.outer(neuron, vectors[3]) if writes else torch.outer(vectors[3], neuron))


# ---- masks


def test_stochastic_masks_lie_between_importance_and_one():
    source = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    lower = torch.rand(50, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = interpolate(lower, source)
    assert torch.allclose(mask, lower + (1 - lower) * source)
    assert (mask >= lower).all()
    assert (mask <= 1).all()
    (gradient,) = torch.autograd.grad(mask.sum(), lower)
    assert torch.allclose(gradient, 1 - source)


def test_routing_draws_a_uniform_size_and_a_uniform_subset():
    routed = uniform_subset(60_000, 6, Uniforms(0), CPU)
    sizes = torch.bincount(routed.sum(1), minlength=7)
    assert sizes[0] == 0
    assert ((sizes[1:] - 10_000).abs() < 5 * math.sqrt(60_000 / 6 * 5 / 6)).all()
    pairs = routed[routed.sum(1) == 2].float()
    share = pairs.T @ pairs / len(pairs)
    off = share[~torch.eye(6, dtype=torch.bool)]
    assert ((off - 1 / 15).abs() < 5 * math.sqrt(1 / 15 / len(pairs))).all()


def test_uniform_numbers_are_uniform_reproducible_and_resumable():
    draws = Uniforms(3)
    first = draws.draw(300, 400, device=CPU)
    state = draws.state(CPU)
    second = draws.draw(300, 400, device=CPU)
    assert float(first.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(first.var()) == pytest.approx(1 / 12, abs=0.002)
    assert not torch.equal(first, second)
    again = Uniforms(3)
    assert torch.equal(again.draw(300, 400, device=CPU), first)
    resumed = Uniforms(3)
    resumed.load(state, CPU)
    assert torch.equal(resumed.draw(300, 400, device=CPU), second)
