"""The table of recovery: rates with Wilson intervals, means over seeds, nulls beside them."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.recovery import recovery, recovery_table, wilson
from decomp_bench.results import COLUMNS


def frame_of(values: dict[tuple[str, int], dict[str, float]]) -> pd.DataFrame:
    """(variant, seed) -> metric -> value, as results."""
    rows = []
    for (variant, seed), metrics in values.items():
        about = dict.fromkeys(COLUMNS) | {
            "run_id": f"{variant}{seed}", "method": "m", "family": "m", "kind": "replacement", "trainable": True, "variant": variant,
            "curve": "trained", "target": "toy:t", "target_hash": "0123456789", "seed": seed, "layer": "all", "site": "all",
            "protocol": "cascading", "gates": "clean", "applicable": "yes",
        }  # fmt: skip
        rows += [about | {"metric": metric, "value": value} for metric, value in metrics.items()]
    return pd.DataFrame(rows)


def test_a_rate_has_the_interval_of_wilson():
    assert wilson(9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(0, 5)[0] == 0


def test_runs_succeed_where_f1_is_one_and_nulls_stand_beside():
    good, bad = {"recovery_f1": 1.0, "mmcs": 0.99, "mmcs_null": 0.5}, {"recovery_f1": 0.8, "mmcs": 0.97, "mmcs_null": 0.7}
    table = recovery_table(frame_of({("a", 0): good, ("a", 1): good, ("a", 2): bad, ("b", 0): bad})).set_index(["variant", "metric"])
    assert table.loc[("a", "success"), "mean"] == pytest.approx(2 / 3)
    assert table.loc[("a", "success"), "seeds"] == 3
    assert table.loc[("b", "success"), "mean"] == 0
    assert table.loc[("a", "mmcs"), "mean"] == pytest.approx((0.99 * 2 + 0.97) / 3)
    assert table.loc[("a", "mmcs"), "null"] == pytest.approx((0.5 * 2 + 0.7) / 3)
    low, high = table.loc[("a", "mmcs"), ["lo", "hi"]]
    assert low < table.loc[("a", "mmcs"), "mean"] < high


def test_a_run_with_a_component_too_many_in_a_map_without_known_mechanisms_does_not_succeed():
    frame = frame_of({("a", 0): {"recovery_f1": 1.0}, ("a", 1): {"recovery_f1": 1.0}})
    of_maps = frame.assign(metric="live_surplus", site="0.mlp.down", value=[0.0, 1.0])
    table = recovery_table(pd.concat([frame, of_maps])).set_index(["variant", "metric"])
    assert table.loc[("a", "success"), "mean"] == 0.5


def test_a_figure_and_a_table_or_the_reason_why_not():
    drawn = recovery(frame_of({("a", 0): {"recovery_f1": 1.0, "matched_cosine": 0.9}}))
    assert set(drawn.figures) == set(drawn.tables) == {"recovery"}
    assert len(drawn.figures["recovery"].axes) == 2
    with pytest.raises(ValueError, match="no run has a measure of recovery"):
        recovery(frame_of({("a", 0): {"fvu": 1.0}}))
