"""The grid of training against scoring: its table's cells, what is drawn where, what the caption says."""

from __future__ import annotations

import math

import pytest
from synthetic import row

from decomp_bench import results
from decomp_bench.analysis import DRAWINGS, caption_of, grid_table

PROTOCOLS = ("cascading", "clean", "single")


def frame(*seeds: int, **own):
    """Two methods, one trained under every protocol, scored best under its own; gates differ under cascading alone."""
    found = []
    for seed in seeds or (0,):
        for trained in (*PROTOCOLS, "local"):
            for protocol in PROTOCOLS:
                for gates in ("clean", "self"):
                    value = (0.2 if trained == protocol else 1.5) + 0.01 * seed
                    value += 0.1 if protocol == "cascading" and gates == "self" else 0.0
                    about = {"run_id": f"{trained}-{seed}", "seed": seed, "protocol": protocol, "gates": gates, "method": "alpha_one"}
                    about |= {"condition": results.condition(trained=trained), **own}
                    found.append(row(**about, value=value, lo=value - 0.1, hi=value + 0.1))
                    sweep = {"curve": "inference", "variant": "k=99", "value": 99.0}
                    found.append(row(**about, **sweep))
    return results.frame(found)


def test_a_cell_has_its_conditions_seeds_and_interval():
    cells = grid_table(frame(0, 1, 2))
    assert len(cells) == 4 * 3 * 2
    one = cells[(cells["trained"] == "clean") & (cells["protocol"] == "cascading") & (cells["gates"] == "self")].iloc[0]
    assert one["mean"] == pytest.approx(1.61)
    assert (one["seeds"], one["tokens"], one["matched"]) == (3, 312_448, False)
    assert "t over 3 seeds" in one["interval"]
    assert one["lo"] < one["mean"] < one["hi"]
    assert set(cells.loc[cells["matched"], "trained"]) == set(PROTOCOLS)
    assert {"target", "token_hash", "split", "positions", "layers"} <= set(cells)


def test_every_cell_is_drawn_and_equal_gates_once():
    figure = DRAWINGS["protocol_grid"](frame()).figures["protocol_grid_ce_delta"]
    drawn = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            if line.get_gid():
                drawn[tuple(line.get_gid().split("/")[2:])] = float(line.get_xdata()[0])
    assert drawn["cascading", "cascading", "self"] == pytest.approx(0.3)
    assert drawn["cascading", "cascading", "clean"] == pytest.approx(0.2)
    assert ("local", "single", "clean") not in drawn
    assert drawn["local", "single", "self"] == pytest.approx(1.5)
    assert len(drawn) == 4 * (2 + 1 + 1)
    assert figure.get_figwidth() == pytest.approx(3.3)
    said = caption_of(figure)
    for part in ("312,448 scored tokens", "1 seed", "mask binary", "Gates that give the same are drawn once"):
        assert part in said


def test_what_does_not_apply_stays_in_the_table_with_its_reason():
    data = frame()
    own = (data["gates"] == "self") & (data["protocol"] == "cascading")
    data.loc[own, ["value", "lo", "hi"]] = math.nan
    data.loc[own, "reason"] = "a gate reads ahead"
    drawing = DRAWINGS["protocol_grid"](data)
    cells = drawing.tables["protocol_grid"]
    assert set(cells.loc[cells["mean"].isna(), "reason"]) == {"a gate reads ahead"}
    assert "protocol_grid_ce_delta" in drawing.figures


def test_a_toy_has_its_own_error_and_nothing_to_draw_is_one_line():
    toy = frame(metric="output_mse")
    assert set(DRAWINGS["protocol_grid"](toy).figures) == {"protocol_grid_output_mse"}
    with pytest.raises(ValueError, match="nothing to draw: no run has ce_delta or"):
        grid_table(frame(metric="fvu"))


def test_rows_of_different_tokens_are_refused():
    data = frame()
    data.loc[data["run_id"] == "local-0", "token_hash"] = "cd"
    with pytest.raises(ValueError, match="different token_hash"):
        grid_table(data)
