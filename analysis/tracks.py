"""What a measurement's entries do along a factor or a damage: one line for each, random controls beside them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .layout import TEXT, Entries, canvas, finish
from .measured import TITLES, Measurements, group_of, label_of, looks, without
from .style import GREY, Style, plain

WHOLE = ("chosen", "all")
"""Places that are no part of a grid."""
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))
"""Of the first, second and third form of a family."""
FLOOR = 1e-4
"""Where a logarithmic y becomes linear, so that it has a place for 0 and none for rounding errors; if nothing is as low, it does not."""


class Axis(NamedTuple):
    """A metric (or `at` itself) on an axis, its label, and whether it is logarithmic (y: linear below `FLOOR`, if shown)."""

    metric: str
    label: str
    log: bool = False


def tracks(found: Measurements, x: Axis, y: Axis, units: str, text: str, controls: bool) -> Figure:
    """
    y against x in the order of the factors or damages, 3.3 inches wide; bars are intervals over `units`. With `controls` the mean of random
    controls is drawn in the same colour, lighter. Raises ValueError where there is nothing to draw.
    """
    data = _joined(found, x, y, units)
    if not controls:
        data = data[~data["control"]]
    if data.empty:
        raise ValueError(f"nothing to draw: no {y.metric} along {x.metric}")
    styles = looks(found)
    height = 2.3
    with plain():
        figure = canvas(1, 3.3, height)
        axes = figure.axes[0]
        handles: dict[str, Entries] = {name: Entries(title, [], []) for name, title in TITLES.items()}
        for (family, kind, trainable), own in data.groupby(["family", "kind", "trainable"]):
            style = styles[str(family), str(kind)]
            for form, dashes in zip(sorted(set(own["form"])), DASHES, strict=False):
                for control in (True, False):
                    _track(axes, own[(own["form"] == form) & (own["control"] == control)].sort_values("place"), style, dashes, control)
                group, setting = handles[group_of(str(kind), bool(trainable))], found.settings.get(str(family), "")
                label = without(setting, label_of((family, kind, trainable, form), data))
                if label not in group.labels:
                    marker = "" if setting else style.marker
                    group.handles.append(Line2D([], [], color=style.colour, linestyle=dashes, linewidth=0.9, marker=marker, markersize=3))
                    group.labels.append(label)
        handles["settings"] = _settings(found, styles)
        _scales(axes, data, x, y)
        finish(figure, height, [entries for entries in handles.values() if entries.handles], text)
    return figure


def _settings(found: Measurements, styles: dict[tuple[str, str], Style]) -> Entries:
    """What marker a setting has, in whatever family."""
    markers = {found.settings[name]: style.marker for (name, _), style in styles.items() if name in found.settings}
    markers = {setting: markers[setting] for setting in found.settings.values() if setting in markers}
    lines: list[Artist] = [Line2D([], [], color=GREY, linestyle="", marker=marker, markersize=3) for marker in markers.values()]
    return Entries("Settings", lines, list(markers))


def _joined(found: Measurements, x: Axis, y: Axis, units: str) -> pd.DataFrame:
    """The places of the grid with x, y and their intervals; a place that is a number is x itself where x has no metric of its own."""
    keys = ["family", "kind", "trainable", "form", "control", "at"]
    every = pd.concat([found.of(y.metric, units, control) for control in (False, True)])
    data = every[~every["at"].isin(WHOLE)].rename(columns={"mean": "y", "lo": "y_lo", "hi": "y_hi"})
    data = data.assign(place=data["at"].astype(float))
    if x.metric == "at":
        return data.assign(x=data["place"], x_lo=np.nan, x_hi=np.nan)
    other = pd.concat([found.of(x.metric, units, control) for control in (False, True)])
    other = other.rename(columns={"mean": "x", "lo": "x_lo", "hi": "x_hi"})
    return data.merge(other[[*keys, "x", "x_lo", "x_hi"]], on=keys)


def _track(axes: Axes, own: pd.DataFrame, style: Style, dashes: str | tuple, control: bool) -> None:
    if own.empty:
        return
    colour = style.light if control else style.colour
    for name in ("x", "y"):
        ends = np.stack([own[name] - own[f"{name}_lo"], own[f"{name}_hi"] - own[name]])
        if np.isfinite(ends).any():
            ends = np.clip(np.nan_to_num(ends), 0, None)
            width = 0.3 if control else 0.5
            across, along = (None, ends) if name == "y" else (ends, None)
            axes.errorbar(own["x"], own["y"], yerr=along, xerr=across, fmt="none", ecolor=colour, elinewidth=width, zorder=2)
    line = axes.plot(own["x"], own["y"], color=colour, linestyle=dashes, linewidth=0.6 if control else 0.9)[0]
    size = (2.0 if control else 3.0) * style.size
    line.set(marker=style.marker, markersize=size, markerfacecolor="white" if control else colour, markeredgewidth=0.4)
    line.set(zorder=2.5 if control else 3.0, gid=f"{'control' if control else 'selected'}/{style.label}")


def _scales(axes: Axes, data: pd.DataFrame, x: Axis, y: Axis) -> None:
    """Labels, and a logarithmic x with the values of the grid as ticks."""
    if x.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(data["x"]))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    if y.log:
        lowest = float(np.nanmin([data["y"].min(), data["y_lo"].min()]))
        if lowest > FLOOR:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=FLOOR, linscale=0.4)
            axes.set_ylim(0.0)
    axes.set_xlabel(x.label, fontsize=TEXT + 0.5, labelpad=2)
    axes.set_ylabel(y.label, fontsize=TEXT + 0.5, labelpad=2)
