"""Components switched off: which and how many, what costs nothing by construction, and what does."""

from __future__ import annotations

import pytest
import torch

from analysis import measured_figures, measured_table
from decomp_bench import measurements, results
from decomp_bench.config import EvalConfig, parse
from decomp_bench.measurements.mass_ablation import ablated
from decomp_bench.registry import method
from decomp_bench.results import unfolded
from decomp_bench.robustness import held, named_masks, soft
from decomp_bench.rows import describe
from tests.test_robustness import make, spd

SMALL = {"rows": 6, "batch": 3, "shares": (0.0, 0.5, 1.0), "draws": 2, "bootstrap": 40}


def rows(decomposer, source, **settings):
    asked = measurements.asked({"mass_ablation": {**SMALL, **settings}}, "test")[0]
    return asked.measurement.measure(decomposer, source, asked.settings, lambda done, parts: None)


def value(found, **keys: str) -> float:
    wanted = {f"{key}={one}" for key, one in keys.items()}
    (chosen,) = [row["value"] for row in found if wanted <= set(row["condition"].split("; "))]
    return chosen


def test_the_sets_grow_within_the_inactive_and_controls_are_as_many(lm):
    target, source = lm
    one = next(held(soft(spd(target)), source, "test", 4, 4, 0))
    order = {name: torch.rand(codes.gate.shape) for name, codes in one.codes.items()}
    before = {name: torch.ones_like(codes.gate) for name, codes in one.codes.items()}
    for share in (0.0, 0.3, 1.0):
        own, control = (ablated(one, order, share, way) for way in ("component", "random matched"))
        for name, codes in one.codes.items():
            mask, inactive = own[name][0], codes.gate == 0
            assert not ((mask == 0) & ~inactive).any()
            assert (mask <= before[name]).all()
            off = (inactive.sum(-1) * share).round()
            assert torch.equal((mask == 0).sum(-1).float(), off.float())
            assert torch.equal((control[name][0] == 0).sum(-1).float(), off.float())
            before[name] = mask
    assert all(((before[name] == 1) == (codes.gate > 0)).all() for name, codes in one.codes.items())


def test_the_ends_are_everything_on_and_the_rounded_gates(lm):
    target, source = lm
    made = spd(target)
    found = rows(made, source)
    one = next(held(soft(made), source, "test", 6, 6, 0))
    for share, name in (("0", "unmasked"), ("1", "rounded above 0")):
        masks = named_masks(measurements.measurement("robustness").Settings(), False)[name](one, torch.Generator())
        logits = soft(made).replaced(one.batch, gates=one.given(masks)).logits.detach()
        kl = (one.scored.clean_p * (one.scored.clean_logp - logits[:, 1:-1].log_softmax(-1))).sum(-1)[one.scored.next_kept].mean()
        assert value(found, way="component", at=share) == pytest.approx(float(kl), rel=1e-4)
    assert value(found, way="random matched", at="0") == value(found, way="component", at="0")


def test_what_has_no_strength_costs_nothing_and_its_control_does(lm):
    target, source = lm
    kind = method("transcoder")
    made = kind(parse(kind.Config, {"activation": "relu", "features": 24}, "test"), target, (0, 1, 2), 0).eval()
    found = rows(made, source)
    assert [row["applicable"] for row in found if row["value"] != row["value"]] == ["trivial"]
    assert value(found, way="random matched", at="1") > value(found, way="random matched", at="0")
    neurons = make("neurons", target, k=23)
    found = rows(neurons, source)
    assert value(found, way="component", at="0") == pytest.approx(0, abs=1e-6)
    assert value(found, way="component", at="1") < value(found, way="random matched", at="1")


def test_the_figure_and_the_table(lm):
    target, source = lm
    every = []
    for made in (spd(target), make("neurons", target, k=4)):
        about = describe(made, source, EvalConfig(), "hash") | {"run_id": made.name, "experiment": "", "seed": 0, "variant": ""}
        about |= {"layer": "all", "site": "all", "applicable": "yes", "reason": "", "curve": ""}
        every += [{**about, **row} for row in rows(made, source)]
    frame = results.frame(every)
    assert set(unfolded(frame)["test"]) == {"mass"}
    (figure,) = measured_figures("mass_ablation", frame).values()
    assert {"selected/neurons", "control/neurons"} <= {line.get_gid() for line in figure.axes[0].lines}
    table = measured_table("mass_ablation", frame)
    assert len(table) == 2
    assert {"off 0", "off 0.5", "off 1", "any off 0.5"} <= set(table[0])
