"""Verdicts of metrics on controls: what counts as told apart, and what is drawn."""

from __future__ import annotations

import math

import pytest
from synthetic import row

from decomp_bench import results
from decomp_bench.analysis import caption_of, measured_figures, measured_note, measured_table


def rows(metric: str, better: str, **values: tuple[float, float] | None):
    """A metric of a run (`none`) and of controls: value and half its interval, None for a missing one."""
    for control, pair in values.items():
        value, half = pair or (math.nan, math.nan)
        words = results.condition(control=control.replace("_", " "), better=better)
        about = {"condition": words, "metric": metric, "family": "alpha", "protocol": "cascading", "gates": "self"}
        yield row(**about, value=value, lo=value - half, hi=value + half, reason="" if pair else "nothing is trained")


def frame():
    return results.frame(
        [
            *rows(
                "ce_delta", "lower", none=(0.5, 0.1), shifted_gates=(2.0, 0.1), random_target=(0.55, 0.1), frozen=(0.1, 0.05), other=None
            ),
            *rows("agreement", "higher", none=(0.9, 0.01), shifted_gates=(0.5, 0.01), random_target=(0.9, 0.02)),
            *rows("alive", "none", none=(90.0, 1.0), shifted_gates=(90.0, 1.0), random_target=(50.0, 1.0)),
            *rows("dead", "lower", none=(0.1, math.nan), shifted_gates=(0.2, math.nan)),
        ]
    )


def test_verdicts_ask_for_intervals_that_are_apart():
    table = {one["metric"]: one for one in measured_table("controls", frame())}
    assert table["ce_delta"]["shifted gates"].endswith("tells")
    assert table["ce_delta"]["random target"].endswith("blind")
    assert table["ce_delta"]["frozen"].endswith("fooled")
    assert table["ce_delta"]["other"] == "nothing is trained"
    assert table["agreement"]["shifted gates"].endswith("tells")
    assert table["alive"]["shifted gates"].endswith("same")
    assert table["alive"]["random target"].endswith("differs")
    assert table["dead"]["shifted gates"].endswith("n/a")
    assert "tells" in measured_note("controls")


def test_figures_show_the_run_beside_its_controls():
    figures = measured_figures("controls", frame())
    assert set(figures) == {"controls_verdicts", "controls_ce_delta", "controls_agreement"}
    axes = figures["controls_ce_delta"].axes[0]
    drawn = [line for line in axes.get_lines() if line.get_gid()]
    assert sorted(float(line.get_xdata()[0]) for line in drawn) == pytest.approx([0.1, 0.5, 0.55, 2.0])
    assert "other (n/a)" in [label.get_text() for label in axes.get_yticklabels()]
    cells = [text.get_text() for text in figures["controls_verdicts"].axes[0].texts]
    assert "0/1!" in cells
    assert "1/1" in cells
    assert "312,448 scored tokens" in caption_of(figures["controls_verdicts"])
    assert all(figure.get_figwidth() == pytest.approx(3.3) for figure in figures.values())


def test_nothing_to_compare_is_one_line():
    with pytest.raises(ValueError, match="nothing to compare"):
        measured_figures("controls", results.frame([row(value=1.0)]))
