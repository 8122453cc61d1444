"""The accounting by hand: what each count means, and what intervals are made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decomp_bench.bootstrap import resampled
from decomp_bench.metrics import CATALOGUE, Context, SiteInfo


def sums(**values):
    """`tokens__all=100` as {("tokens", "all"): array([100.])}."""
    return {tuple(key.split("__")): np.array([float(value)]) for key, value in values.items()}


def value(metric, found, context):
    return CATALOGUE[metric].compute(found, context)["all", "all"][0]


def test_a_feature_that_writes_to_several_layers_counts_for_each():
    sites = (SiteInfo("0", 0, "mlp", 64, 2), SiteInfo("1", 1, "mlp", 64, 1))
    context = Context((0, 1), sites, "lm", "cascading", constant_size=20, coefficient_bits=3, alive={"0": 32, "1": 64})
    counted = {"active__0": 40, "active__1": 60, "active_coefficients__0": 40, "active_coefficients__1": 60}
    found = sums(tokens__all=10, active_scalars__0=400, active_scalars__1=300, **counted)
    assert value("l0_mlp", found, context) == (4 * 2 + 6) / 2
    assert value("l0_node", found, context) == (4 + 6) / 2
    assert value("l0_module", found, context) == (4 + 6) / 2
    assert value("active_params", found, context) == (40 + 30 + 20) / 2
    assert value("bits", found, context) == (4 * (5 + 3) + 6 * (6 + 3)) / 2
    of_rank_two = found | sums(active_coefficients__1=120)
    assert value("bits", of_rank_two, context) == (4 * (5 + 3) + 6 * (6 + 2 * 3)) / 2


def test_matrices_of_an_mlp_add_up_and_attention_is_apart():
    sites = (SiteInfo("0.mlp.up", 0, "mlp", 8, 1), SiteInfo("0.mlp.down", 0, "mlp", 8, 1), SiteInfo("0.attn.q", 0, "attn", 8, 1))
    context = Context((0,), sites, "lm", "cascading")
    found = {("tokens", "all"): np.array([2.0])} | {
        ("active", s.name): np.array([n]) for s, n in zip(sites, (4.0, 6.0, 100.0), strict=True)
    }
    assert value("l0_mlp", found, context) == 5
    assert value("l0_module", found, context) == 2.5
    assert value("l0_attention", found, context) == 50


def test_an_always_on_part_is_billed():
    site = (SiteInfo("0", 0, "mlp", 8, 1),)
    found = sums(tokens__all=1, active__0=0, active_scalars__0=0, active_coefficients__0=0)
    with_skip = Context((0,), site, "lm", "clean", constant_size=64, constant_coefficients=8, coefficient_bits=4)
    assert value("active_params", found, with_skip) == 64
    assert value("bits", found, with_skip) == 32


def test_a_recovered_share_is_not_given_where_the_ablation_does_nothing():
    context = Context((0,), (), "lm", "cascading")
    found = sums(targets__all=100, ce__all=210, ce_clean__all=200, ce_mean__all=203, ce_zero__all=400)
    assert np.isnan(value("ce_recovered_mean", found, context))
    assert value("ce_recovered_zero", found, context) == pytest.approx(190 / 200)


def test_single_layers_average():
    context = Context((0, 1), (), "lm", "single")
    found = sums(targets__all=10, ce_clean__all=20, ce__0=21, ce__1=25)
    values = CATALOGUE["ce_delta"].compute(found, context)
    assert values["0", "all"][0] == pytest.approx(0.1)
    assert values["1", "all"][0] == pytest.approx(0.5)
    assert values["all", "all"][0] == pytest.approx(0.3)


@given(st.integers(1, 40), st.integers(1, 30))
def test_resamples_draw_as_many_documents_as_there_are(documents, replicates):
    weights = resampled(documents, replicates)
    assert weights.shape == (1 + replicates, documents)
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == documents).all()


def test_every_metric_declares_what_it_is():
    for metric in CATALOGUE.values():
        assert metric.title
        assert metric.formula
        assert metric.source
        assert metric.direction in ("lower", "higher", "none")
