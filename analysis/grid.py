"""What runs were trained under against what they are scored under: a dot for each cell, with its interval, and the table of all cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from decomp_bench.results import unfolded

from .intervals import describe, over_seeds, together
from .labels import Measure, measure
from .layout import TEXT, Entries, canvas, finish
from .points import GATES, PROTOCOLS, View, rows
from .style import COLOURS, plain

TRAINED = "trained"
"""Key of the conditions that says what a run was trained under: a protocol, or anything else."""
METRICS = {
    "ce_delta": Measure("CE increase (nats/token)", "CE of the replaced model minus CE of the target, on the same tokens"),
    "ce_recovered_mean": Measure(
        "CE recovered", "(CE_mean - CE) / (CE_mean - CE_clean), CE_mean with the MLPs' outputs at their training mean"
    ),
    "output_mse": Measure("Squared error", "mean squared difference from the target's output"),
}
ABOUT = ["target", "target_hash", "dataset", "token_hash", "split", "positions", "layers"]
CELL = ["method", "family", "kind", "variant", TRAINED, "protocol", "gates"]
ROW, LEFT = 0.155, 1.0  # inches for a row, and for the labels
MARKERS = {"self": "o", "clean": "D"}
MATCHED, OTHER, BAND = COLOURS[0], "#333333", "#d6e6f2"


class Drawing(NamedTuple):
    """Figures and tables by the names of their files."""

    figures: Mapping[str, Figure]
    tables: Mapping[str, pd.DataFrame]


def protocol_grid(frame: pd.DataFrame) -> Drawing:
    """The grid of every metric of `METRICS` that is there; raises ValueError with one line where there is nothing to draw."""
    cells = grid_table(frame)
    figures = {f"protocol_grid_{key}": grid(cells, key) for key in METRICS if cells.loc[cells["metric"] == key, "mean"].notna().any()}
    return Drawing(figures, {"protocol_grid": cells})


def grid_table(frame: pd.DataFrame) -> pd.DataFrame:
    """
    One row for each (run without its seed, protocol, gates, metric): what it was trained under, mean over seeds, interval and what that
    is, scored tokens, convergence, and `matched`, whether training and protocol are the same.
    """
    own = frame[frame["curve"] == "trained"]
    there = [key for key in METRICS if key in set(own["metric"])]
    if not there:
        raise ValueError(f"nothing to draw: no run has {' or '.join(METRICS)}")
    view = View(protocols=tuple(name for name in PROTOCOLS if name in set(own["protocol"])))
    found = unfolded(rows(own, tuple(there), view))
    found = found.assign(**{TRAINED: found.get(TRAINED, ""), "n": found["n"].astype("float64")})
    by = [*CELL, "metric", "metric_version"]
    groups = found.groupby(by)
    facts = pd.DataFrame({"tokens": groups["n"].min(), "converged": groups["converged"].agg(together), "reason": groups["reason"].first()})
    cells = over_seeds(found, by, "value", "lo", "hi").join(facts).reset_index()
    cells["interval"] = [describe([int(seeds)]) for seeds in cells["seeds"]]
    cells["matched"] = cells[TRAINED] == cells["protocol"]
    return cells.assign(**{name: str(found[name].iloc[0]) for name in ABOUT})


def grid(cells: pd.DataFrame, metric: str) -> Figure:
    """
    A panel for each protocol, a line for each way of training, grouped by method, 3.3 inches wide. Round: gates of the stream at hand;
    diamonds: of the clean pass. Blue on a band: trained under the panel's protocol. Raises ValueError where there is nothing to draw.
    """
    data = cells[(cells["metric"] == metric) & cells["mean"].notna()]
    if data.empty:
        raise ValueError(f"nothing to draw: no {metric}")
    protocols = [name for name in PROTOCOLS if name in set(data["protocol"])]
    lines, titles, last = _lines(data)
    height = ROW * (last + 0.6)
    with plain():
        figure = canvas(len(protocols), 3.3, height)
        for axes, protocol in zip(figure.axes, protocols, strict=True):
            own = data[data["protocol"] == protocol]
            for key, place in lines.items():
                _row(axes, _of(own, key), place, key[2] == protocol)
            axes.set_title(protocol, fontsize=TEXT + 0.5, pad=3)
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
        _scale(figure, data, metric)
        _labels(figure.axes[0], lines, titles, last)
        finish(figure, height, [_legend(data)], _caption(data, metric), LEFT)
    return figure


Line = tuple[str, str, str]
"""Method, variant and what it was trained under."""


def _lines(data: pd.DataFrame) -> tuple[dict[Line, float], list[tuple[float, str]], float]:
    """Where each line stands, the titles between them, and the last place; protocols first, in their own order."""
    order = {name: i for i, name in enumerate(PROTOCOLS)}
    known = sorted(
        set(data[["method", "variant", TRAINED]].itertuples(index=False, name=None)),
        key=lambda one: (one[0], one[1], order.get(one[2], -1), one[2]),
    )
    lines, titles, place, before = {}, [], 0.0, ""
    for key in known:
        place += 1.0 if key[0] == before else 1.95
        titles += [(place - 0.95, key[0].replace("_", " "))] if key[0] != before else []
        lines[key], before = place, key[0]
    return lines, titles, place


def _of(data: pd.DataFrame, key: Line) -> pd.DataFrame:
    return data[(data["method"] == key[0]) & (data["variant"] == key[1]) & (data[TRAINED] == key[2])]


def _row(axes: Axes, own: pd.DataFrame, place: float, matched: bool) -> None:
    """Both gate sources of a cell, one of them where they are equal."""
    colour = MATCHED if matched else OTHER
    if matched:
        axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0, zorder=0.5)
    points = {gates: own[own["gates"] == gates].iloc[0] for gates in GATES if (own["gates"] == gates).any()}
    if len(points) == 2 and np.isclose(points["self"]["mean"], points["clean"]["mean"], rtol=1e-6):
        del points["clean"]
    for gates, one in points.items():
        y = place + (0.0 if len(points) == 1 else -0.17 if gates == "self" else 0.17)
        if np.isfinite(one["lo"]) and np.isfinite(one["hi"]):
            axes.plot([one["lo"], one["hi"]], [y, y], color=colour, linewidth=0.9, solid_capstyle="butt", zorder=3)
        mark = axes.plot(one["mean"], y, linestyle="none", marker=MARKERS[gates], markersize=3.2 if gates == "self" else 2.6)[0]
        face = "white" if one["converged"] == "no" else colour
        mark.set(color=colour, markerfacecolor=face, markeredgewidth=0.6, zorder=4, clip_on=False)
        mark.set_gid(f"{one['method']}/{one['variant']}/{one[TRAINED]}/{one['protocol']}/{gates}")


def _scale(figure: Figure, data: pd.DataFrame, metric: str) -> None:
    """A logarithmic axis where all means are positive and span a decade; the label once, below all panels."""
    low, high = float(data["mean"].min()), float(data["mean"].max())
    log = low > 0 and high / low > 8
    margin = (high / low) ** 0.12 if log else 0.08 * (high - low or 1.0)
    for axes in figure.axes:
        axes.set_xscale("log" if log else "linear")
        axes.set_xlim((low / margin, high * margin) if log else (low - margin, high + margin))
        if log:
            powers = [10.0**power for power in range(-6, 4) if low / margin <= 10.0**power <= high * margin]
            powers = powers[:: 1 + (len(powers) - 1) // 3] or [low, high]
            axes.set_xticks(powers, [f"{value:g}" for value in powers])
            axes.tick_params(axis="x", which="minor", labelbottom=False)
        else:
            axes.locator_params(axis="x", nbins=3)
    figure.axes[len(figure.axes) // 2].set_xlabel(METRICS[metric].label, fontsize=TEXT + 0.5, labelpad=2)


def _labels(axes: Axes, lines: Mapping[Line, float], titles: list[tuple[float, str]], last: float) -> None:
    """Ways of training beside the lines, with the variant where a method has several; methods in bold between them."""
    axes.set_ylim(last + 0.7, 0.3)
    several = {key[0] for key in lines for other in lines if key[0] == other[0] and key[1] != other[1]}
    names = [", ".join(filter(None, (key[2] or "own way", key[1] if key[0] in several else ""))) for key in lines]
    axes.set_yticks(list(lines.values()), names, fontsize=TEXT)
    for place, title in titles:
        axes.text(-0.08, place, title, transform=axes.get_yaxis_transform(), fontsize=TEXT, fontweight="bold", ha="right", va="center")


def _legend(data: pd.DataFrame) -> Entries:
    marks = [
        (Line2D([], [], color=OTHER, marker=MARKERS["self"], linestyle="none", markersize=3.2), "gates self"),
        (Line2D([], [], color=OTHER, marker=MARKERS["clean"], linestyle="none", markersize=2.6), "gates clean"),
        (Patch(color=BAND), "scored as trained"),
    ]
    if (data["converged"] == "no").any():
        hollow = Line2D([], [], color=OTHER, marker="o", linestyle="none", markersize=3.2, markerfacecolor="white", markeredgewidth=0.6)
        marks.append((hollow, "not converged"))
    return Entries("Panels: scored under. Lines: trained under", [mark for mark, _ in marks], [text for _, text in marks])


def _caption(data: pd.DataFrame, metric: str) -> str:
    facts, about = data.iloc[0], measure(metric, METRICS)
    tokens, version = sorted({int(n) for n in data["tokens"].dropna()}), int(facts["metric_version"])
    scored = " to ".join(f"{n:,}" for n in dict.fromkeys((tokens[0], tokens[-1])))
    alone = len(data) - len(data.drop_duplicates([*CELL[:-1], "mean"]))
    return (
        f"{about.label}: {about.definition} (version {version}). Target {facts['target']} ({facts['target_hash'][:8]}), layers "
        f"{facts['layers']}; {facts['dataset']}, {facts['split']} split (tokens {facts['token_hash'][:8]}), "
        f"{scored} scored tokens, positions {facts['positions']}; mask binary, "
        f"weight delta off. Bars: {describe([int(n) for n in data['seeds']])}."
        + (" Gates that give the same are drawn once." if alone else "")
    )
