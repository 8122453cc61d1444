"""Matching found with true: recorded values, hand cases, planted truth and junk."""

from __future__ import annotations

import math

import pytest
import torch

from decomp_bench import matching as m
from tests.golden.recorded import Golden


@pytest.mark.parametrize("case", ["perfect_pentagon_plus_two_dead", "random", "tiny_component_steals_argmax"])
def test_mmcs_and_ml2r_are_the_recorded_ones(case):
    golden = Golden("metrics_mmcs_ml2r")
    U, V, W = (golden[f"in.{case}.{name}"].double() for name in "UVW")
    cosine, ratio = m.columns(V.T, U, W.T)
    values = {"mmcs": m.mmcs(cosine), "ml2r": m.ml2r(cosine, ratio), "ml2r_maxnorm": m.ml2r_longest(cosine, ratio)}
    if case == "random":  # no cosine is above 0.99 there: ours is 0, the recorded one measures component 0
        assert values.pop("ml2r_maxnorm") == 0
    for key, value in values.items():
        assert value == pytest.approx(float(golden[f"f64.out.{case}.{key}"]), abs=1e-6), key
    assert torch.equal(cosine.argmax(0), golden[f"out.{case}.argmax"])
    golden.agrees(f"out.{case}.cos_per_feature", cosine.amax(0))


def test_the_reference_s_own_decomposition_is_found_complete():
    golden = Golden("tms_ref_decomposition_main_s4_seed0")
    U, V, W = golden["param.linear1.U"], golden["param.linear1.V"], golden["target.linear1.weight"]
    cosine, ratio = m.columns(V.T, U, W.T)
    assert m.mmcs(cosine) == pytest.approx(float(golden["out.mmcs"]), abs=1e-6)
    assert m.ml2r(cosine, ratio) == pytest.approx(float(golden["out.ml2r"]), abs=1e-6)
    live = golden["out.component_norms"] > 0.1
    whole, length = _whole(V.T[live], U[live], W.T)
    assert m.recovery(whole, length) == {"precision": 1, "recall": 1, "f1": 1, "merges": 0, "splits": 0, "spare": 0}
    for name in ("linear1", "linear2"):
        assert m.identity_error(golden[f"out.ci_lower_onehot.{name}"]) == int(golden[f"out.identity_ci_error.{name}.tol0.1"])


@pytest.mark.parametrize("case", ["perfect_permuted", "one_missing", "two_comps_for_one_feature", "faint", "random"])
@pytest.mark.parametrize("tolerance", [0.1, 0.2])
def test_importance_errors_are_the_recorded_ones(case, tolerance):
    golden = Golden("metrics_identity_ci_error_spd_main")
    ci = golden[f"in.{case}"]
    assert m.identity_error(ci, tolerance) == int(golden[f"out.identity.{case}.tol{tolerance}"])
    assert m.dense_error(ci, 2, 1, tolerance) == int(golden[f"out.dense2.{case}.tol{tolerance}"])
    assert m.dense_error(ci, 4, 2, tolerance) == int(golden[f"out.dense4min2.{case}.tol{tolerance}"])


def test_a_feature_without_any_component_is_an_error():
    assert m.identity_error(torch.eye(3)[:, :2]) == 1


def _whole(feature, other, true):
    """Cosines and ratios of lengths of whole matrices feature[c] (x) other[c] with e_i (x) true[i], by writing the matrices out."""
    found = torch.einsum("cf,cd->cfd", feature, other).flatten(1)
    planted = torch.einsum("fg,fd->fgd", torch.eye(len(true)), true).flatten(1)
    return m.cosines(found, planted), found.norm(dim=1)[:, None] / planted.norm(dim=1)


def planted(features=6, width=4, seed=0):
    true = torch.randn(features, width, generator=torch.Generator().manual_seed(seed))
    return torch.eye(features), true


def test_planted_truth_scores_one_in_any_order_and_sign():
    feature, true = planted()
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    cosine, ratio = _whole(-2 * feature[order], -0.5 * true[order], true)
    assert m.matched_cosine(cosine) == pytest.approx(1, abs=1e-6)
    assert m.recovery(cosine, ratio) == {"precision": 1, "recall": 1, "f1": 1, "merges": 0, "splits": 0, "spare": 0}


def test_junk_does_not():
    generator = torch.Generator().manual_seed(1)
    _, true = planted()
    cosine, ratio = _whole(torch.randn(12, 6, generator=generator), torch.randn(12, 4, generator=generator), true)
    assert m.recovery(cosine, ratio)["f1"] == 0
    assert m.matched_cosine(cosine) < 0.7
    assert m.recovery(cosine[:0], ratio[:0]) == {"precision": 0, "recall": 0, "f1": 0, "merges": 0, "splits": 0, "spare": 0}
    assert m.matched_cosine(cosine[:0]) == 0


def test_duplicates_splits_merges_and_wrong_lengths_are_told_apart():
    feature, true = planted()
    two = [torch.cat([part, part[:1]]) for part in (feature, true)]
    twice = m.recovery(*_whole(*two, true))
    assert (twice["recall"], twice["precision"], twice["spare"], twice["splits"]) == (1, pytest.approx(6 / 7), 1, 1)
    halves = m.recovery(*_whole(torch.cat([feature[:1] / 2, feature[:1] / 2, feature[1:]]), torch.cat([true[:1], true]), true))
    assert (halves["recall"], halves["splits"]) == (pytest.approx(5 / 6), 1)
    same = torch.stack([true[0], true[0] + 0.1 * true[1], *true[2:]])
    merged = m.recovery(*_whole(torch.cat([(feature[0] + feature[1])[None], feature[2:]]), same[[0, 2, 3, 4, 5]], same))
    assert (merged["merges"], merged["recall"]) == (1, pytest.approx(4 / 6))
    longer = m.recovery(*_whole(feature * 1.3, true, true))
    assert longer["f1"] == 0
    assert m.recovery(*_whole(feature * 1.2, true, true))["f1"] == 1


def test_the_published_ratio_is_blind_to_length_and_the_other_is_not():
    feature, true = planted(3, 2)
    found = torch.cat([1e-3 * torch.eye(3), feature]), torch.cat([true, true + 0.05])
    cosine, ratio = m.columns(*found, true)
    assert m.mmcs(cosine) == pytest.approx(1, abs=1e-5)
    assert m.ml2r(cosine, ratio) == pytest.approx(1e-3, rel=1e-3)
    assert m.ml2r_longest(cosine, ratio) == pytest.approx(1, abs=0.2)


def test_neuron_contributions_correlate_one_for_the_true_components_only():
    generator = torch.Generator().manual_seed(0)
    response, effect = (torch.randn(8, 5, generator=generator).abs() for _ in range(2))
    assert m.contribution_correlation(response, effect, torch.eye(8), response, effect) == pytest.approx(1, abs=1e-6)
    junk = m.contribution_correlation(response, effect, torch.eye(8), torch.randn(8, 5, generator=generator), effect)
    assert abs(junk) < 0.8


def test_absorption_is_what_the_child_takes_over():
    generator = torch.Generator().manual_seed(0)
    parent = torch.rand(4000, generator=generator) < 0.3
    child = parent & (torch.rand(4000, generator=generator) < 0.5)
    noise = torch.rand(4000, generator=generator) < 0.3
    honest, absorbed, half = parent, parent & ~child, parent & ~(child & noise)
    for component, expected in ((honest, 0.0), (absorbed, 1.0), (half, float(noise[child].float().mean()))):
        value, f1 = m.absorption(torch.stack([noise, component], 1), parent, child)
        assert value == pytest.approx(expected)
        assert f1 == pytest.approx(1)
    value, f1 = m.absorption(noise[:, None], parent, child)
    assert abs(value) < 0.1
    assert f1 < 0.4
    assert math.isfinite(value)
