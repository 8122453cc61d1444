"""What is drawn and tabled of each measurement, by its name; a measurement that is not here has its rows and no figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from . import robustness
from .forest import forest
from .measured import Measurements, conditions, read, summary
from .tracks import Axis, tracks

STEERING = (
    "Steering score: harmonic mean of concept (detector's score of the text minus the unsteered texts' mean, at least 0) and fluency "
    "(likelihood under the clean model beside the unsteered text, times variety), mean over texts of held-out prompts"
)
ABLATION = "Selected by AUROC on other documents; random controls have the same sites and activity"


def _steering(frame: pd.DataFrame) -> dict[str, Figure]:
    found = read(frame, "factor")
    factors = sorted({float(at) for at in found.data[found.data["kind"] != "baseline"]["at"] if at != "chosen"})
    grid = f" Factors |dy|/|y|: {', '.join(f'{factor:g}' for factor in factors)}."
    score = f"{STEERING}, at the factor that is best on other prompts.{' '}" + conditions(found, "prompts", grid)
    front = "Concept against fluency of steered text along the factor, mean over concepts; bars over prompts. " + conditions(
        found, "prompts", grid
    )
    return {
        "steering_score": forest(found, "steering_score", "chosen", "prompts", "Steering score", score),
        "steering_frontier": tracks(
            found, Axis("steering_concept", "Concept"), Axis("steering_fluency", "Fluency"), "prompts", front, controls=False
        ),
    }


def _at(found: Measurements) -> str:
    """The damage at which most entries have an interval over documents, the largest of those."""
    data = found.of("ablation_on_at_damage", "documents")
    counts = data.assign(known=data["lo"].notna()).groupby("at")["known"].sum()
    if counts.empty:
        raise ValueError("nothing to draw: no damage was reached")
    return max(counts.index, key=lambda at: (counts[at], float(at)))


def _ablation(frame: pd.DataFrame) -> dict[str, Figure]:
    found = read(frame, "damage")
    at = _at(found)
    same = conditions(found, "documents")
    selective = f"Selectivity on/(on + |off|) where other text loses {at} nats a token; at 0.5 (dotted) both lose alike. {ABLATION}. {same}"
    along = f"Selectivity on/(on + |off|) where other text loses as much as the x axis says. {ABLATION} (lighter, hollow). {same}"
    return {
        "ablation_selectivity": forest(
            found, "ablation_selectivity_at_damage", at, "documents", f"Selectivity at {at} nats/token elsewhere", selective, 0.5
        ),
        "ablation_by_damage": tracks(
            found,
            Axis("at", "Loss on other text (nats/token)", True),
            Axis("ablation_selectivity_at_damage", "Selectivity"),
            "documents",
            along,
            controls=True,
        ),
    }


def _steering_table(frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    return summary(read(frame, "factor"), "steering_score", "steering_gain", "chosen")


def _ablation_table(frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    found = read(frame, "damage")
    return summary(found, "ablation_on_at_damage", "ablation_gain", _at(found))


DRAWN: dict[str, Callable[[pd.DataFrame], dict[str, Figure]]] = {
    "steering": _steering,
    "topic_ablation": _ablation,
    "robustness": robustness.figures,
}
TABLED: dict[str, Callable[[pd.DataFrame], Sequence[Mapping[str, object]]]] = {
    "steering": _steering_table,
    "topic_ablation": _ablation_table,
    "robustness": robustness.table,
}


def measured_figures(name: str, frame: pd.DataFrame) -> dict[str, Figure]:
    """The figures of a measurement's rows, none for a measurement that has none; raises ValueError with one line."""
    return DRAWN[name](frame) if name in DRAWN else {}


HEADINGS = {"robustness": "error a token under each kind of mask, after some steps of an adversary, and of the summed weights (relative)"}
CONCEPTS = "over all concepts; brackets: 95% over concepts; gain: above the mean of random controls"


def measured_heading(name: str) -> str:
    """What the numbers of a measurement's table are."""
    return HEADINGS.get(name, CONCEPTS)


def measured_table(name: str, frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    """A measurement's rows in brief, none for a measurement that has no table; raises ValueError with one line."""
    return TABLED[name](frame) if name in TABLED else []
