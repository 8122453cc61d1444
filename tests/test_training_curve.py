"""Compute recovered: monotone, one where nothing is lost, and where no curve is, said so."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decomp_bench import results
from decomp_bench.errors import UserError
from decomp_bench.training_curve import WITHOUT, compute_recovered, curve_of, recovered

HAND = pd.DataFrame({"tokens": [0.0, 100, 200, 300, 400], "validation_ce": [8.0, 4.0, 3.0, 3.5, 2.5]})


def test_by_hand():
    found = recovered(HAND, np.array([0, -0.1, 0.5, 1.0, 1.25, 1.5, 5.5, 9.0, np.nan]))
    assert found == pytest.approx([1, 1, 0.875, 0.75, 0.5, 0.25, 0, 0, np.nan], nan_ok=True)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=12), st.lists(st.floats(-2, 12), min_size=2, max_size=8))
def test_less_is_recovered_where_more_is_lost(curve, rises):
    data = pd.DataFrame({"tokens": np.arange(len(curve), dtype=float), "validation_ce": curve})
    found = recovered(data, np.array([0.0, *sorted(rises)]))
    assert (np.diff(found[1:]) <= 1e-12).all()
    assert ((found >= 0) & (found <= 1)).all()
    assert found[0] == (1 if curve[-1] < max(curve) else 0)


@pytest.mark.parametrize("target", ["pydocs-4l", "pydocs-4l@1"])
def test_the_committed_curves_are_found_again_at_their_own_points(target):
    curve = curve_of(target)
    assert curve is not None
    ce, tokens = curve["validation_ce"].to_numpy(), curve["tokens"].to_numpy()
    falls = np.append(np.maximum.accumulate(ce[::-1])[::-1][1:] < ce[:-1], True)
    assert recovered(curve, ce - ce[-1])[falls] == pytest.approx((tokens / tokens[-1])[falls])


def rows(target: str):
    about = {"target": target, "protocol": "cascading", "applicable": "yes", "reason": "", "layer": "all", "site": "all", "n": 9}
    return results.frame([{**about, "metric": "ce_delta", "value": 0.3, "lo": 0.2, "hi": 0.5}, {**about, "metric": "kl", "value": 0.3}])


def test_rows_carry_the_interval_and_a_missing_curve_is_said(tmp_path):
    (row,) = compute_recovered(rows("pydocs-4l")).to_dict("records")
    assert row["metric"] == "compute_recovered"
    assert 0.2 < row["lo"] < row["value"] < row["hi"] < 0.9
    (row,) = compute_recovered(rows(f"hf:{tmp_path}")).to_dict("records")
    assert (row["applicable"], row["reason"]) == ("no", WITHOUT)
    assert np.isnan(row["value"])
    HAND.to_csv(tmp_path / "training_curve.csv")
    (row,) = compute_recovered(rows(f"hf:{tmp_path}")).to_dict("records")
    assert (row["lo"], row["value"], row["hi"]) == pytest.approx((0.875, 0.925, 0.95))


@pytest.mark.parametrize("text", ["", "step,loss\n1,2\n", "tokens,validation_ce\n0,abc\n1,2\n", "tokens,validation_ce\n0,3\n"])
def test_a_broken_curve_is_one_line(tmp_path, text):
    (tmp_path / "training_curve.csv").write_text(text)
    with pytest.raises(UserError, match="is no training curve") as told:
        curve_of(f"hf:{tmp_path}")
    assert "\n" not in str(told.value)
