"""What runs recovered of a toy's known mechanisms: how often all of them and nothing else, and how close components come."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .grid import Drawing
from .intervals import over_seeds
from .labels import Measure
from .layout import TEXT, Entries, canvas, finish
from .points import tidy, told_apart
from .style import GREY, plain, styles

SUCCESS = "success"
"""Share of the runs whose components are the mechanisms one to one, with none to spare: F1 of 1, and in maps of which only the number of
live components is known, that number."""
MEASURES = {
    SUCCESS: Measure("F1 = 1", "share of runs whose live components are the known mechanisms, one to one, with none to spare in any map"),
    "matched_cosine": Measure("Matched cosine", "mean cosine of mechanisms with components under the best one-to-one assignment"),
    "recovery_f1": Measure("F1", "of mechanisms found one to one"),
    "mmcs": Measure("MMCS", "mean over mechanisms of the largest cosine"),
    "absorption": Measure("Absorption", "how much oftener a parent's component is off where a child is on"),
    "hop_r2": Measure("Hop R²", "share of the change of the outputs that is met when what the first layer wrote is patched"),
}
PANELS = (SUCCESS, "matched_cosine")
OWN_PANEL = ("absorption", "hop_r2", "mmcs")
"""The first of these that a target has is a panel too."""
TABLED = (
    *("recovery_f1", "matched_cosine", "mmcs", "ml2r", "ml2r_longest", "merges", "splits", "spare", "live", "ci_error", "contributions"),
    *("absorption", "undetected", "hop_r2", "edge_precision", "edge_recall"),
)
ENTRY = ["method", "family", "kind", "variant"]
ROW, LEFT = 0.21, 1.25  # inches for a row, and for the labels
CROWDED = 16
"""Entries from which on those of a family share a row."""


def wilson(successes: int, runs: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson interval of a rate."""
    rate, spread = successes / runs, z * z / runs
    middle, half = rate + spread / 2, z * math.sqrt(rate * (1 - rate) / runs + spread / (4 * runs))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def recovery(frame: pd.DataFrame) -> Drawing:
    """The table and the figure of a results frame; raises ValueError with one line where nothing was recovered from."""
    table = recovery_table(frame)
    return Drawing({"recovery": figure_of(table, frame)}, {"recovery": table})


def recovery_table(frame: pd.DataFrame) -> pd.DataFrame:
    """
    One row for each (run without its seed, measure): mean over seeds with its t interval, the mean of its null where there is one, and
    the number of seeds; `success` with its Wilson interval.
    """
    data = tidy(told_apart(frame))
    whole = data[(data["layer"] == "all") & (data["site"] == "all") & (data["curve"] == "trained") & data["value"].notna()]
    whole = whole.drop_duplicates([*ENTRY, "seed", "run_id", "metric"])
    own = whole[whole["metric"].isin(TABLED)]
    if own.empty:
        raise ValueError("nothing to draw: no run has a measure of recovery; take a toy whose mechanisms are known")
    by = [*ENTRY, "metric"]
    cells = over_seeds(own.assign(lo=np.nan, hi=np.nan), by, "value", "lo", "hi").reset_index()
    nulls = whole[whole["metric"].str.endswith("_null")].assign(metric=lambda rows: rows["metric"].str.removesuffix("_null"))
    cells = cells.merge(nulls.groupby(by)["value"].mean().rename("null").reset_index(), how="left", on=by)
    wrong = data[(data["metric"] == "live_surplus") & (data["site"] != "all") & (data["value"].fillna(0) != 0)]["run_id"]
    return pd.concat([_successes(own, set(wrong)), cells], ignore_index=True).assign(target=str(data["target"].iloc[0]))


def _successes(own: pd.DataFrame, wrong: set[str]) -> pd.DataFrame:
    """Rates of F1 = 1, less the runs in which some map has the wrong number of live components."""
    found = own[own["metric"] == "recovery_f1"]
    rows = []
    for entry, group in found.groupby(ENTRY):
        wins, runs = int(((group["value"] > 1 - 1e-9) & ~group["run_id"].isin(wrong)).sum()), len(group)
        low, high = wilson(wins, runs)
        rows.append(dict(zip(ENTRY, entry, strict=True)) | {"metric": SUCCESS, "mean": wins / runs, "lo": low, "hi": high, "seeds": runs})
    return pd.DataFrame(rows)


def figure_of(table: pd.DataFrame, frame: pd.DataFrame) -> Figure:
    """A panel for each measure, a row for each entry or family of many, 3.3 inches wide; grey crosses: the null of the same measure."""
    there = set(table["metric"])
    panels = [key for key in (*PANELS, *[key for key in OWN_PANEL if key in there][:1]) if key in there]
    entries = list(dict.fromkeys(table[ENTRY].itertuples(index=False, name=None)))
    looks = styles(told_apart(tidy(frame)))
    names = _names(entries) if len(entries) <= CROWDED else [entry[1].partition(",")[0] for entry in entries]  # without conditions
    rows_of = {name: place for place, name in enumerate(dict.fromkeys(names))}
    colours = {name: looks[entry[1], entry[2]].colour for name, entry in reversed([*zip(names, entries, strict=True)])}
    height = ROW * (len(rows_of) + 0.8)
    with plain():
        figure = canvas(len(panels), 3.3, height)
        for axes, key in zip(figure.axes, panels, strict=True):
            rows = table[table["metric"] == key].set_index(ENTRY)
            for name, entry in zip(names, entries, strict=True):
                if entry in rows.index:
                    _dot(axes, rows.loc[entry], rows_of[name], colours[name])
            axes.set_title(MEASURES[key].label, fontsize=TEXT, pad=3)
            axes.set_xlim(-0.04, 1.04)
            axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
            axes.set_ylim(len(rows_of) - 0.4, -0.6)
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
        figure.axes[0].set_yticks(range(len(rows_of)), ["\n".join(textwrap.wrap(name, 26)) for name in rows_of], fontsize=TEXT)
        finish(figure, height, [_legend()], _caption(table, panels, frame), LEFT)
    return figure


def _dot(axes, row: pd.Series, place: int, colour: str) -> None:
    if np.isfinite(row["lo"]) and np.isfinite(row["hi"]):
        axes.plot([max(row["lo"], 0), min(row["hi"], 1)], [place, place], color=colour, linewidth=0.9, solid_capstyle="butt", zorder=3)
    axes.plot(row["mean"], place, marker="o", markersize=3.2, color=colour, zorder=4, clip_on=False)
    if np.isfinite(row.get("null", np.nan)):
        axes.plot(row["null"], place, marker="x", markersize=2.6, color=GREY, markeredgewidth=0.6, zorder=2, clip_on=False)


def _names(entries: list[tuple]) -> list[str]:
    """Families, with the variant where a family has several."""
    several = {entry[1] for entry in entries for other in entries if entry[1] == other[1] and entry[3] != other[3]}
    return [entry[1] + (f", {entry[3]}" if entry[1] in several else "") for entry in entries]


def _legend() -> Entries:
    dot = Line2D([], [], color="#333333", marker="o", linestyle="none", markersize=3.2)
    cross = Line2D([], [], color=GREY, marker="x", linestyle="none", markersize=2.6, markeredgewidth=0.6)
    return Entries("Marks", [dot, cross], ["mean, or rate", "null: random directions of the same lengths"])


def _caption(table: pd.DataFrame, panels: list[str], frame: pd.DataFrame) -> str:
    seeds = sorted({int(n) for n in table["seeds"]})
    count = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))
    return (
        f"{'; '.join(f'{MEASURES[key].label}: {MEASURES[key].definition}' for key in panels)}. Target {table['target'].iloc[0]} "
        f"({str(frame['target_hash'].iloc[0])[:8]}), seeds an entry: {count}. Bars: 95%, Wilson for the rate, t over seeds for the others."
        + (" Settings of one family share a row." if len(set(table[ENTRY].itertuples(index=False, name=None))) > CROWDED else "")
    )

