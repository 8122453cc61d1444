"""One line for each decomposition: a value at one place, with its intervals, beside the mean of its random controls."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .layout import TEXT, Entries, canvas, finish
from .measured import TITLES, Measurements, group_of, label_of, looks, ordered
from .style import GREY, Style, plain

ROW = 0.155  # inches
LEFT = 1.3  # inches for the labels


MARKS = ("selected, or a baseline", "mean of random controls")


def forest(
    found: Measurements,
    metric: str,
    at: str,
    units: str,
    label: str,
    text: str,
    zero: float | None = None,
    marks: tuple[str, str] = MARKS,
) -> Figure:
    """
    The metric at `at` of every entry, by group and then by size, 3.3 inches wide. Filled: what was selected; hollow: the mean of random
    controls (`marks` names both). Thick bar: over `units`; thin: over what the measurement is a mean of, where that is another. Dotted
    line at `zero`. Raises ValueError where there is nothing to draw.
    """
    widths = {over: width for over, width in {f"{found.each}s": 0.6, units: 1.8}.items() if not found.of(metric, over, at=at).empty}
    if not widths:
        raise ValueError(f"nothing to draw: no {metric} at {at}")
    own = found.of(metric, next(iter(widths)), at=at)
    entries = ordered(own)
    styles = looks(found)
    places, ticks, place, before = {}, [], 0.0, ""
    for entry in entries:
        group = group_of(entry[1], entry[2])
        place += 1.0 if group == before else 1.9
        ticks += [(place - 0.95, TITLES[group])] if group != before else []
        places[entry], before = place, group
    height = ROW * (place + 0.8)
    with plain():
        figure = canvas(1, 3.3, height)
        axes = figure.axes[0]
        for control in (True, False):
            for over, width in widths.items():
                table = found.of(metric, over, control, at)
                for entry in [entry for entry in entries if entry in table.index]:
                    y = places[entry] + (0.28 if control else 0.0)
                    _bar(axes, table.loc[entry], y, styles[entry[0], entry[1]], width, control)
        _labels(axes, places, ticks, own.index)
        if zero is not None:
            axes.axvline(zero, color=GREY, linewidth=0.5, linestyle=":", zorder=1, gid="zero")
        axes.set_xlabel(label, fontsize=TEXT + 0.5, labelpad=2)
        axes.grid(False, axis="y")
        finish(figure, height, [_legend(widths, marks)], text, LEFT)
    return figure


def _bar(axes: Axes, row: pd.Series, y: float, style: Style, width: float, control: bool) -> None:
    colour = style.light if control else style.colour
    width = width * (0.6 if control else 1.0)
    if np.isfinite(row["lo"]) and np.isfinite(row["hi"]):
        axes.plot([row["lo"], row["hi"]], [y, y], color=colour, linewidth=width, solid_capstyle="butt", zorder=2 + width / 10)
    face = "white" if control else colour
    size = (2.6 if control else 3.6) * style.size
    point = axes.plot(row["mean"], y, linestyle="none", marker=style.marker, markersize=size, markerfacecolor=face, markeredgecolor=colour)[
        0
    ]
    point.set(markeredgewidth=0.6 if control else 0.25, zorder=4, gid=f"{'control' if control else 'selected'}/{style.label}")


def _labels(axes: Axes, places: dict[tuple, float], titles: list[tuple[float, str]], index: pd.MultiIndex | pd.Index) -> None:
    """Names beside the rows, group titles in bold between them, the first on top."""
    axes.set_ylim(max(places.values()) + 0.8, min(place for place, _ in titles) - 0.6)
    axes.set_yticks(list(places.values()), [label_of(entry, index.to_frame(index=False)) for entry in places], fontsize=TEXT)
    axes.tick_params(axis="y", length=0)
    for place, title in titles:
        axes.text(-0.03, place, title, transform=axes.get_yaxis_transform(), fontsize=TEXT, fontweight="bold", ha="right", va="center")


def _legend(widths: Mapping[str, float], names: tuple[str, str]) -> Entries:
    dark, light = "#333333", "#999999"
    own = Line2D([], [], color=dark, marker="o", linestyle="none", markersize=3.6)
    control = Line2D([], [], color=light, marker="o", linestyle="none", markersize=2.6, markerfacecolor="white")
    bars = [Line2D([], [], color=dark, linewidth=width) for width in widths.values()]
    texts = [f"interval over {over}" for over in widths]
    return Entries("Marks", [own, control, *bars[::-1]], [*names, *texts[::-1]])
