"""Interventions: spliced by hand, exact where nothing may change, matched in strength."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decomp_bench import registry
from decomp_bench.config import parse
from decomp_bench.data.streams import with_clean
from decomp_bench.directions import Directions
from decomp_bench.errors import UserError
from decomp_bench.intervene import Intervention, intervened, layers_of, matched, one, perturbation
from decomp_bench.replacement import clean_codes, clean_points

METHODS = {
    "neurons": {"k": 6},
    "svd": {"k": 4},
    "transcoder": {"activation": "topk", "features": 24, "k": 4},
    "sae": {"activation": "topk", "features": 24, "k": 4},
    "clt": {"activation": "topk", "features": 24, "k": 4},
    "spd": {"components": 30},
}


def make(name, target):
    kind = registry.method(name)
    return kind(parse(kind.Config, METHODS[name], name), target, tuple(range(target.layers)), 0).eval()


@pytest.fixture(params=METHODS)
def case(request, lm):
    target, source = lm
    decomposer = make(request.param, target)
    batch = with_clean(source, source.batch("test", np.arange(5)), clean_points(decomposer))
    return decomposer, batch


def site_with_idle(decomposer, batch):
    """A site, a component that is active somewhere and one that is active nowhere (or None)."""
    codes = clean_codes(decomposer, batch)
    for site in decomposer.sites:
        on = codes[site.name].active.flatten(0, 1).any(0)
        if on.any():
            idle = (~on).nonzero()
            return site, int(on.nonzero()[0, 0]), int(idle[0, 0]) if len(idle) else None
    raise AssertionError("nothing is on")


def test_without_an_edit_the_logits_are_the_clean_ones_exactly(case):
    decomposer, batch = case
    assert torch.equal(intervened(decomposer, batch, None).logits, batch.logits)


def test_zeroing_what_is_inactive_changes_nothing_and_what_is_active_something(case):
    decomposer, batch = case
    site, active, idle = site_with_idle(decomposer, batch)
    if idle is not None:
        out = intervened(decomposer, batch, Intervention("zero", one(site.name, idle)))
        assert torch.equal(out.logits, batch.logits)
    assert not torch.equal(intervened(decomposer, batch, Intervention("zero", one(site.name, active))).logits, batch.logits)


def by_hand(decomposer, batch, write, dy):
    """Logits of the target with dy added to the output of a module at every position but the first."""
    target = decomposer.target
    module = target.part(write.removesuffix(".out"))

    def hook(_module, _args, output):
        changed = output.clone()
        changed[:, 1:] += dy
        return changed

    handle = module.register_forward_hook(hook)
    try:
        return target(batch.x)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["zero", "scale", "add", "clamp", "open"])
def test_an_intervention_is_the_write_vector_spliced_in_by_hand(case, kind):
    decomposer, batch = case
    clean = clean_codes(decomposer, batch)
    on = [site for site in decomposer.sites if clean[site.name].active.any()]
    for site in (on[0], on[-1]):
        codes, slot = clean[site.name], site.slots[0]
        active = int(codes.active.flatten(0, 1).any(0).nonzero()[0, 0])
        value, strength = codes.value[..., active], codes.strength[..., active]
        after = {"zero": 0 * value, "scale": 3 * value, "add": value - 3, "clamp": 0 * value - 3, "open": -3 * strength}[kind]
        write = decomposer.directions(site, slot)[1][active]
        weight = 1.0 if kind in ("zero", "scale") else -1.0
        out = intervened(decomposer, batch, Intervention(kind, one(site.name, active, weight), 3.0, (site.layer,)))
        expected = by_hand(decomposer, batch, slot.write, (after - value)[..., None] * write)
        torch.testing.assert_close(out.logits, expected, atol=2e-4, rtol=1e-3)


def test_keep_only_zeroes_the_others(case):
    decomposer, batch = case
    site, active, _ = site_with_idle(decomposer, batch)
    kept = intervened(decomposer, batch, Intervention("keep", one(site.name, active)))
    others = {site.name: {i: 1.0 for i in range(site.n) if i != active}}
    assert torch.equal(kept.logits, intervened(decomposer, batch, Intervention("zero", others)).logits)


def test_strength_is_what_the_outputs_change_by(case):
    decomposer, batch = case
    site, active, _ = site_with_idle(decomposer, batch)
    for kind in ("add", "open", "scale"):
        found = matched(decomposer, batch, Intervention(kind, one(site.name, active)), 0.5)
        assert found is not None
        assert perturbation(decomposer, batch, found) == pytest.approx(0.5, rel=0.02)


def test_the_perturbation_of_a_constant_push_is_its_length_over_the_mean_output(lm):
    target, source = lm
    decomposer = make("transcoder", target)
    batch = with_clean(source, source.batch("test", np.arange(5)), clean_points(decomposer))
    site = decomposer.sites[1]
    kept = (torch.arange(batch.x.shape[1])[None] < batch.length[:, None])[:, 1:]
    length = decomposer.directions(site, site.slots[0])[1][3].norm()
    mean = batch.clean["1.mlp.out"][:, 1:][kept].norm(dim=-1).mean()
    assert perturbation(decomposer, batch, Intervention("add", one("1", 3), 2.0)) == pytest.approx(float(2 * length / mean), rel=1e-4)


def test_a_component_with_many_writes_is_held_to_the_same_budget_whole_and_at_its_source(lm):
    target, source = lm
    decomposer = make("clt", target)
    batch = with_clean(source, source.batch("test", np.arange(5)), clean_points(decomposer))
    everywhere, at_source = Intervention("add", one("0", 2)), Intervention("add", one("0", 2), layers=(0,))
    assert layers_of(decomposer, everywhere) == (0, 1, 2)
    assert layers_of(decomposer, at_source) == (0,)
    pair = [matched(decomposer, batch, i, 1.0) for i in (everywhere, at_source)]
    assert [perturbation(decomposer, batch, i) for i in pair] == pytest.approx([1.0, 1.0], rel=0.02)
    assert not torch.allclose(*(intervened(decomposer, batch, i).logits for i in pair))


def test_zeroing_a_direction_projects_it_out(lm):
    target, source = lm
    vector, mean = torch.randn(1, target.width, generator=torch.Generator().manual_seed(1)), torch.ones(target.width)
    bank = Directions.of(target, {1: vector}, {1: mean})
    batch = with_clean(source, source.batch("test", np.arange(3)), clean_points(bank))
    out = intervened(bank, batch, Intervention("zero", one("1.mlp.out", 0))).outputs[1]
    unit = vector[0] / vector[0].norm()
    torch.testing.assert_close(out @ unit, (mean @ unit).expand(out.shape[:2]), atol=1e-4, rtol=1e-4)
    rest = lambda y: y - (y @ unit)[..., None] * unit
    torch.testing.assert_close(rest(out), rest(batch.clean["1.mlp.out"][:, 1:]), atol=1e-4, rtol=1e-4)


def test_wrong_requests_name_the_fix(lm):
    target, source = lm
    decomposer = make("neurons", target)
    batch = with_clean(source, source.batch("test", np.arange(2)), clean_points(decomposer))
    with pytest.raises(UserError, match="no site 'x'; it has 0, 1, 2"):
        intervened(decomposer, batch, Intervention("zero", one("x", 0)))
    with pytest.raises(UserError, match="components 0 to 23; got 24"):
        intervened(decomposer, batch, Intervention("zero", one("0", 24)))
    spd = make("spd", target).at(delta=True)
    batch = with_clean(source, source.batch("test", np.arange(2)), clean_points(spd))
    with pytest.raises(UserError, match="delta off"):
        intervened(spd, batch, Intervention("zero", one("0.mlp.down", 0)))
