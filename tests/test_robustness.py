"""Masks between the gates and one: what they do by hand, what an adversary must reach, and what gives zero by construction."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import measured_figures, measured_table
from decomp_bench import measurements, results
from decomp_bench.config import EvalConfig, parse
from decomp_bench.registry import method
from decomp_bench.results import unfolded
from decomp_bench.robustness import Donors, RobustnessConfig, climbed, held, is_trivial, joined, mean_error, named_masks, soft, sourced
from decomp_bench.rows import describe

SMALL = {
    "rows": 6, "batch": 3, "donor_rows": 6, "ascents": (1, 4), "constants": (0.0, 0.5, 1.0), "donors": (2,), "draws": 2, "bootstrap": 40,
}  # fmt: skip


def make(name: str, target, **config):
    kind = method(name)
    return kind(parse(kind.Config, config, name), target, tuple(range(target.layers)), 0).eval()


def spd(target, **config):
    return make("spd", target, **{"components": 12, "init": "random", "gate_hidden": (8,), **config})


def rows(decomposer, source, **settings):
    asked = measurements.asked({"robustness": {**SMALL, **settings}}, "test")[0]
    return asked.measurement.measure(decomposer, source, asked.settings, lambda done, parts: None)


def value(found, metric: str, **keys: str) -> float:
    wanted = {f"{key}={one}" for key, one in keys.items()}
    (chosen,) = [row["value"] for row in found if row["metric"] == metric and wanted <= set(row["condition"].split("; "))]
    return chosen


def test_what_gives_nothing_by_construction_and_masks_against_the_harness(lm):
    target, source = lm
    made = spd(target)
    found = rows(made, source)
    assert value(found, "robustness_kl", test="constant", at="1") == pytest.approx(0, abs=1e-6)  # everything and the remainder
    assert value(found, "robustness_kl", test="mask", at="unmasked") > 1e-4
    one = next(held(soft(made), source, "test", 6, 6, 0))
    config = RobustnessConfig()
    views = {"importance": made.at(mask="soft"), "rounded above 0.1": made.at(threshold=0.1), "unmasked": made.at(mask="all")}
    for name, view in views.items():
        masks = named_masks(config, True)[name](one, torch.Generator())
        expected = view.replaced(one.batch, gates="clean").logits
        assert torch.allclose(soft(made).replaced(one.batch, gates=one.given(masks)).logits, expected, atol=1e-5), name
    neurons = rows(make("neurons", target, k=4), source)
    assert value(neurons, "robustness_kl", test="mask", at="unmasked") == pytest.approx(0, abs=1e-6)
    assert value(neurons, "robustness_kl", test="mask", at="dropped") > value(neurons, "robustness_kl", test="mask", at="importance")
    one = next(held(made := make("neurons", target, k=4), source, "test", 6, 6, 0))
    logits = made.replaced(one.batch, gates=one.given(named_masks(config, False)["zero"](one, torch.Generator()))).logits
    kl = (one.scored.clean_p * (one.scored.clean_logp - logits[:, 1:-1].log_softmax(-1))).sum(-1)[one.scored.next_kept].mean()
    assert value(neurons, "robustness_kl", test="mask", at="zero") == pytest.approx(float(kl), rel=1e-4)


def test_sources_by_hand(lm):
    target, source = lm
    made = soft(spd(target))
    one = next(held(made, source, "test", 4, 4, 0))
    fixed = {name: torch.rand(codes.gate.shape[-1] + 1) for name, codes in one.codes.items()}
    for name, (mask, delta) in sourced(one, True, lambda name, _: fixed[name]).items():
        g = one.codes[name].gate
        assert torch.allclose(mask, g + (1 - g) * fixed[name][:-1])
        assert delta is not None
        assert torch.equal(delta, fixed[name][-1].expand(g.shape[:-1]))
    assert all(delta is None for _, delta in sourced(one, False, lambda *_: 0.5).values())


@pytest.mark.parametrize("kind", ["lm", "toy"])
def test_an_adversary_does_more_harm_than_as_many_random_steps(kind, request):
    target, source = request.getfixturevalue(kind)
    made = soft(spd(target))
    one = next(held(made, source, "test", 8, 8, 0))
    config = RobustnessConfig(ascents=(1, 8), rate=0.1)
    errors = {}
    for blind in (False, True):
        for step, masks in climbed(made, one, True, config, torch.Generator().manual_seed(3), blind):
            masks = {name: (mask.detach(), delta) for name, (mask, delta) in masks.items()}
            errors[blind, step] = float(mean_error(made, one, masks).detach())
            assert all(float(mask.min()) >= 0 and float(mask.max()) <= 1 for mask, _ in masks.values())
    assert errors[False, 8] > errors[False, 1]
    assert errors[False, 8] > 1.2 * errors[True, 8]
    assert all(parameter.grad is None for parameter in made.parameters())


def test_donors_and_controls_of_the_same_numbers(lm):
    target, source = lm
    made = soft(spd(target, components=24))
    found = list(held(made, source, "validation", 8, 4, 1))
    donors = Donors.of(found)
    needed = donors.union(5, torch.Generator().manual_seed(0))
    chosen = torch.randperm(len(next(iter(donors.active.values()))), generator=torch.Generator().manual_seed(0))[:5]
    for name, one in needed.items():
        assert torch.equal(one, donors.active[name][chosen].any(0))
        for matched in (False, True):
            control = donors.control({name: one}, torch.Generator().manual_seed(1), matched)[name]
            assert control.sum() == one.sum()
            if matched:
                order = donors.active[name].float().mean(0).argsort(stable=True)
                assert all(control[group].sum() == one[group].sum() for group in order.tensor_split(10))
    for name, (mask, _) in joined(found[0], needed).items():
        assert torch.equal(mask, torch.maximum(found[0].codes[name].gate, needed[name].float()))


def test_what_has_no_strength_where_it_is_closed_is_trivial(lm):
    target, source = lm
    made = make("transcoder", target, activation="relu", features=24)
    assert is_trivial(list(held(made, source, "test", 4, 4, 0)))
    found = rows(made, source)
    told = [row for row in found if row.get("applicable") == "trivial"]
    assert {row["condition"] for row in told} == {"test=constant", "test=adversary", "test=aggregation"}
    assert not is_trivial(list(held(make("neurons", target, k=4), source, "test", 4, 4, 0)))
    assert all(np.isnan(row["value"]) for row in found if row["metric"] == "weight_error")


def test_the_error_of_the_summed_components(lm):
    target, source = lm
    exact = rows(spd(target, components=None, init="neuron"), source)
    made = spd(target)
    found = rows(made, source)
    assert max(row["value"] for row in exact if row["metric"] == "weight_error") < 1e-5
    part, weight = made.components["1.mlp.up"], target.weight("1.mlp.up")
    expected = float((weight - (part.V @ part.U).T).norm() / weight.norm())
    (error,) = [row["value"] for row in found if row["metric"] == "weight_error" and row["site"] == "1.mlp.up"]
    assert error == pytest.approx(expected, rel=1e-5)


def test_the_figures_and_the_table(lm):
    target, source = lm
    every = []
    for made in (spd(target), make("neurons", target, k=4), make("transcoder", target, activation="relu", features=24)):
        about = describe(made, source, EvalConfig(), "hash") | {"run_id": made.name, "experiment": "", "seed": 0, "variant": ""}
        about |= {"layer": "all", "site": "all", "applicable": "yes", "reason": "", "curve": ""}
        every += [{**about, **row} for row in rows(made, source)]
    frame = results.frame(every)
    assert set(unfolded(frame)["test"]) == {"mask", "constant", "adversary", "aggregation", "weights"}
    figures = measured_figures("robustness", frame)
    assert set(figures) == {"robustness_constant", "robustness_adversary", "robustness_aggregation"}
    drawn = {line.get_gid() for line in figures["robustness_adversary"].axes[0].lines}
    assert {"selected/neurons", "control/neurons"} <= drawn
    assert not any("transcoder" in (gid or "") for gid in drawn)
    table = measured_table("robustness", frame)
    assert len(table) == 3
    assert {"importance", "dropped", "adversary at 1", "adversary at 4", "weight error"} <= set(table[0])
    sparser = frame[frame["method"] == "spd"].assign(variant="sparser", run_id="other", value=lambda own: 2 * own["value"])
    both = {row["family"]: row for row in measured_table("robustness", pd.concat([frame, sparser], ignore_index=True))}
    (known,) = [row for row in table if row["family"].startswith("spd")]
    one, other = (both[f"{known['family']}, {variant}"] for variant in ("", "sparser"))
    assert one["stochastic"] == known["stochastic"], "settings of one family are not averaged"
    assert float(other["stochastic"]) == pytest.approx(2 * float(known["stochastic"]), rel=0.01)
