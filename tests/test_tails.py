"""Tails of components and of tokens: what is known beforehand of planted ones."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from decomp_bench.measurements import asked
from decomp_bench.results import unfolded
from tests.planted import Basis, make


class Even(Basis):
    """Every component of every token contributes the same, and the first four are let through."""

    name = "even"

    def encode(self, inputs, gates=None):
        codes = super().encode(inputs, gates)
        for code in codes.values():
            code.strength = torch.ones_like(code.strength)
            code.gate = (torch.arange(code.gate.shape[-1]) < 4).float().expand_as(code.gate)
        return codes


def table(decomposer, source, **settings):
    (one,) = asked({"tails": {"tokens": 600, "bootstrap": 30, "batch": 4, **settings}}, "test")
    return unfolded(pd.DataFrame(one.measurement.measure(decomposer, source, one.settings, lambda _done, _parts: None)))


def of(found, metric, **where):
    own = found[found["metric"] == metric]
    for key, value in where.items():
        own = own[own[key].fillna("all") == value]
    return own


def test_equal_contributions_leave_what_is_counted_off(lm):
    target, source = lm
    found = table(make(Even, target), source, ranks=[1, 4, 8, 64])
    shares = of(found, "tail_share", site="all").set_index("rank")["value"]
    assert {rank: float(value) for rank, value in shares.items()} == pytest.approx({"1": 15 / 16, "4": 12 / 16, "8": 8 / 16})
    assert set(found["rank"]) >= {"1", "4", "8"}  # 64 has nothing beyond it
    assert "64" not in set(found["rank"])


def test_shares_fall_with_the_rank_and_lie_within_their_intervals(lm):
    target, source = lm
    found = table(make(Basis, target), source, ranks=[1, 2, 4, 8])
    for metric in ("tail_share", "tail_active"):
        own = of(found, metric, site="all")
        values = own["value"].tolist()
        assert values == sorted(values, reverse=True)
        assert ((own["lo"] <= own["value"]) & (own["value"] <= own["hi"])).all()
        assert len(of(found, metric, site="1")) == 4
    assert of(found, "tail_active", site="all")["value"].tolist() == pytest.approx([1 - r / target.width for r in (1, 2, 4, 8)])


def test_a_share_of_tokens_holds_at_least_its_share_and_is_of_the_target_alone(lm):
    target, source = lm
    found = table(make(Basis, target), source, shares=[0.1, 1.0])
    own = of(found, "token_share")
    assert (own["run_id"] == "").all()
    assert len(own) == target.layers * 2 * 2
    assert own[own["share"] == "1"]["value"].tolist() == pytest.approx([1.0] * 2 * target.layers)
    assert (own[own["share"] == "0.1"]["value"] >= 0.1).all()


def test_nothing_depends_on_the_batch(lm):
    target, source = lm
    one, other = (table(make(Basis, target), source, batch=size) for size in (1, 16))
    keys = ["metric", "layer", "site", "condition"]
    both = one.merge(other, on=keys, suffixes=("", "_other"), how="outer")
    assert both["value"].tolist() == pytest.approx(both["value_other"].tolist())
