"""Pareto figures: sparsity or size against fidelity, one panel per protocol, from a results frame alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from .caption import caption
from .labels import Measure, measure
from .layout import TEXT, Entries, canvas, finish
from .points import Points, View, curves, points, same_for_both_gates, told_apart
from .style import GREY, GROUPS, Style, plain, styles

XS = ("l0_mlp", "active_params", "bits")
YS = ("ce_delta", "fvu", "kl")
SWEEPS = ("middle", "all", "none")


class Look(NamedTuple):
    """Line and marker of one kind of curve."""

    dashes: str | tuple
    line: float
    marker: float
    order: float


LOOKS = {
    "floor": Look((0, (4, 2)), 0.5, 2.8, 2.0),
    "inference": Look((0, (2.5, 1.5)), 0.7, 1.9, 3.0),
    "trained": Look("-", 1.1, 3.6, 4.0),
}


SMALLEST = 1e-3
"""Share of the largest mean below which a logarithmic axis stops."""


class Scale(NamedTuple):
    """The y axis: linear, log or symlog, its limits, and the sentence that a caption needs."""

    name: str
    limits: tuple[float, float]
    linear: float
    note: str


def _rounded_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * (1 - 1e-9))


def y_scale(means: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> Scale:
    """
    Logarithmic where the means are positive and span between one decade and three; linear about 0 and logarithmic beyond where some are
    not positive or a thousandth of the largest: everything-on controls are zero to rounding, and would stretch a logarithmic axis.
    The limits follow the means; bars may run out of the frame, which the note then says.
    """
    low, high = float(means.min()), float(means.max())
    size = np.abs(means[means != 0])
    wide = size.size > 0 and size.max() / size.min() > 10
    if wide and low > SMALLEST * high:
        margin = (high / low) ** 0.06
        name, limits, linear, note = "log", (low / margin, high * margin), 0.0, ""
    elif wide:
        linear = _rounded_up(max(-low, SMALLEST * high))
        name, limits = "symlog", (min(-0.3 * linear, 1.2 * low), max(high * 1.2, linear))
        note = f"The y axis is linear between {-linear:g} and {linear:g}, logarithmic beyond."
    else:
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        name, limits, linear, note = "linear", (low - margin, high + margin), 0.0, ""
    if np.nanmin(np.append(lo, low)) < limits[0] or np.nanmax(np.append(hi, high)) > limits[1]:
        note = f"{note} Some bars run out of the frame.".strip()
    return Scale(name, limits, linear, note)


def _shown(data: pd.DataFrame, sweeps: str) -> pd.DataFrame:
    """All trained curves and floors, and the wanted inference sweeps; `middle` keeps that of each family's middle checkpoint."""
    if sweeps not in SWEEPS:
        raise ValueError(f"sweeps is {sweeps!r}: choose {', '.join(SWEEPS)}")
    sweep = data["curve"] == "inference"
    if sweeps == "all":
        return data
    if sweeps == "none":
        return data[~sweep]
    keep = ~sweep
    for (family, kind), own in data[sweep].groupby(["family", "kind"]):
        same = data[(data["family"] == family) & (data["kind"] == kind) & (data["curve"] == "trained")]
        order = [*same.groupby("variant")["x"].mean().sort_values().index, *sorted(own["origin"].unique())]
        swept = list(dict.fromkeys(origin for origin in order if origin in set(own["origin"])))
        keep |= sweep & (data["family"] == family) & (data["kind"] == kind) & (data["origin"] == swept[(len(swept) - 1) // 2])
    return data[keep]


def _bars(axes: Axes, curve: pd.DataFrame, colour: str, look: Look, gid: str) -> None:
    """Intervals in y and, thinner, in x; an end that is not known is not drawn."""
    ends = {}
    for name in ("x", "y"):
        middle = curve[name].to_numpy(float)
        low, high = (curve[f"{name}_{end}"].fillna(curve[name]).to_numpy(float) for end in ("lo", "hi"))
        ends[name] = np.clip([middle - low, high - middle], 0, None)
    for name, width in (("y", 0.6), ("x", 0.35)):
        if ends[name].any():
            bars = {"yerr": ends["y"]} if name == "y" else {"xerr": ends["x"]}
            drawn = axes.errorbar(curve["x"], curve["y"], fmt="none", ecolor=colour, elinewidth=width, zorder=look.order - 0.5, **bars)
            drawn.lines[2][0].set_gid(f"{gid}/interval-{name}")


def _curve(axes: Axes, curve: pd.DataFrame, key: dict, style: Style) -> None:
    """One curve: its line, filled or hollow markers, and bars. The line's gid says which curve it is."""
    look, colour = LOOKS[key["curve"]], style.colour
    if key["gates"] != "clean":
        look, colour = look._replace(order=look.order - 0.4), style.light
    names = [key[name] for name in ("protocol", "gates", "family", "kind", "curve", "origin")]
    gid = "/".join(name for name in names if name).replace(" ", "_")
    _bars(axes, curve, colour, look, gid)
    axes.plot(curve["x"], curve["y"], linestyle=look.dashes, linewidth=look.line, color=colour, zorder=look.order, gid=gid)
    hollow = (curve["converged"] == "no") & (key["curve"] != "floor")
    for which, face, name in ((~hollow, colour, "converged"), (hollow, "white", "unconverged")):
        if which.any():
            some = curve[which]
            line = axes.plot(some["x"], some["y"], linestyle="none", marker=style.marker, color=colour)[0]
            line.set(markersize=look.marker * style.size, markerfacecolor=face, zorder=look.order + 0.1, gid=f"{gid}/{name}")
            separated = name == "converged" and key["curve"] == "trained"
            line.set(markeredgecolor="white" if separated else colour, markeredgewidth=0.7 if face == "white" else 0.25)


def _handle(style: Style, drawn: set[str], dark: bool) -> Line2D:
    """The legend's line of a family, in its strongest form."""
    look = LOOKS[next(name for name in ("trained", "floor", "inference") if name in drawn)]
    colour = style.colour if dark else style.light
    size = max(look.marker, 3.0) * style.size
    line = Line2D([], [])
    line.set(linestyle=look.dashes, linewidth=look.line, color=colour, marker=style.marker, markersize=size)
    line.set(markeredgewidth=0.25, markeredgecolor="white" if "trained" in drawn else colour)
    return line


def _legend(data: pd.DataFrame, looks: Mapping[tuple[str, str], Style]) -> list[Entries]:
    """Families by group, so that what sees y stands apart, then the meaning of lines and markers as far as they occur."""
    groups: dict[str, Entries] = {name: Entries(title, [], []) for name, title in GROUPS.items()}
    for (family, kind), own in data.groupby(["family", "kind"]):
        style = looks[str(family), str(kind)]
        groups[style.group].handles.append(_handle(style, set(own["curve"]), "clean" in set(own["gates"])))
        groups[style.group].labels.append(style.label)
    dark, marks = "#333333", Entries("Lines and markers", [], [])
    trained, sweep, hollow = data["curve"] == "trained", data["curve"] == "inference", data["converged"] == "no"
    for present, label, options in (
        (trained.any(), "trained separately", {"linewidth": 1.1}),
        (sweep.any(), "sweep of one checkpoint", {"linewidth": 0.7, "linestyle": LOOKS["inference"].dashes}),
        ((data["gates"] == "clean").any(), "gates clean", {"linewidth": 1.1, "marker": "o"}),
        ((data["gates"] == "self").any(), "gates self", {"linewidth": 1.1, "marker": "o", "color": "#aaaaaa"}),
        ((hollow & (trained | sweep)).any(), "not converged", {"linestyle": "none", "marker": "o", "markerfacecolor": "white"}),
    ):
        if present:
            marks.handles.append(Line2D([], [], color=dark, markersize=3.6, markeredgewidth=0.6))
            marks.handles[-1].set(**options)
            marks.labels.append(label)
    return [entries for entries in (*groups.values(), marks) if entries.handles]


def _number(value: float, _: int = 0) -> str:
    """A tick label: 0.05, 20, 5k, 1M."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _log_ticks(axis: Axis, low: float, high: float, most: float) -> None:
    """Ticks at 1, 2 and 5 where the axis spans at most `most` decades, else at powers of ten, as plain numbers."""
    if math.log10(high / low) <= most:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_formatter(NullFormatter())


def _symlog_ticks(axis: Axis, scale: Scale) -> None:
    """Ticks at 0, at both ends of the linear part, and beyond it at powers of ten."""
    beyond = [10.0**power for power in range(-9, 10) if 1.9 * scale.linear < 10.0**power <= scale.limits[1]]
    axis.set_major_locator(FixedLocator([-scale.linear, 0.0, scale.linear, *beyond]))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_locator(NullLocator())


def _axes(figure: Figure, data: pd.DataFrame, view: View, measures: Mapping[str, Measure] | None) -> Scale:
    """Scales, limits, titles and labels of all panels."""
    low, high = float(data["x"].min()), float(data["x"].max())
    margin = max((high / low) ** 0.05, 1.1 if high / low > 4 else 1.8)
    scale = y_scale(*(data[name].to_numpy(float) for name in ("y", "y_lo", "y_hi")))
    for axes, protocol in zip(figure.axes, view.protocols, strict=True):
        axes.set_xscale("log", nonpositive="clip")
        axes.set_xlim(low / margin, high * margin)
        options = {"nonpositive": "clip"} if scale.name == "log" else {"linthresh": scale.linear, "linscale": 0.4} if scale.linear else {}
        axes.set_yscale(scale.name, **options)
        axes.set_ylim(*scale.limits)
        _log_ticks(axes.xaxis, low / margin, high * margin, 2.6)
        if scale.name == "log":
            _log_ticks(axes.yaxis, *scale.limits, 3.2)
        if scale.name == "symlog":
            axes.axhline(0, color=GREY, linewidth=0.4, zorder=1, gid="zero")
            _symlog_ticks(axes.yaxis, scale)
        if protocol not in set(data["protocol"]):
            axes.text(0.5, 0.5, "no finite points", fontsize=TEXT, ha="center", transform=axes.transAxes)
        axes.set_title(f"protocol: {protocol}", fontsize=7, pad=3)
        axes.set_xlabel(measure(view.x, measures).label, fontsize=TEXT + 0.5, labelpad=2)
    figure.axes[0].set_ylabel(measure(view.y, measures).label, fontsize=TEXT + 0.5, labelpad=2)
    return scale


def pareto(
    frame: pd.DataFrame,
    view: View | None = None,
    *,
    sweeps: str = "middle",
    width: float | None = None,
    height: float | None = None,
    looks: Mapping[tuple[str, str], Style] | None = None,
    measures: Mapping[str, Measure] | None = None,
) -> Figure:
    """
    One panel per protocol of the view. Solid: trained separately; dashed: inference sweeps (`middle` of a family's checkpoints, `all`
    or `none`); hollow: not converged; grey: floors. Three panels are 7 inches wide, one is 3.3. Raises ValueError with one line.
    """
    view, frame = view or View(), told_apart(frame)
    found = points(frame, view)
    data = _shown(found.data, sweeps)
    data = data[~(twins := same_for_both_gates(data))]
    if data.empty:
        raise ValueError(f"nothing to draw with sweeps={sweeps!r}: the frame holds inference sweeps only, pass sweeps='all'")
    looks = looks or styles(frame)
    height = height or (2.2 if len(view.protocols) == 1 else 2.0)
    with plain():
        figure = canvas(len(view.protocols), width or (3.3 if len(view.protocols) == 1 else 7.0), height)
        scale = _axes(figure, data, view, measures)
        panels = dict(zip(view.protocols, figure.axes, strict=True))
        for name, curve in curves(data):
            _curve(panels[name["protocol"]], curve, name, looks[name["family"], name["kind"]])
        shown = Points(data, found.left_out, found.facts)
        text = caption(shown, view, sweeps=sweeps, coincide=bool(twins.any()), scale=scale.note, measures=measures)
        finish(figure, height, _legend(data, looks), text)
    return figure


def paretos(
    frame: pd.DataFrame,
    view: View | None = None,
    *,
    xs: tuple[str, ...] = XS,
    ys: tuple[str, ...] = YS,
    narrow: tuple[str, ...] = ("cascading",),
    **options,
) -> dict[str, Figure]:
    """
    Every pair of x and y as `Y_by_X`, all protocols of the view in one figure, and the protocols of `narrow` each alone as
    `Y_by_X_PROTOCOL` for a column of 3.3 inches. The view gives the other conditions, `options` go to `pareto`.
    """
    view = view or View()
    figures = {}
    for x, y in product(xs, ys):
        wanted = replace(view, x=x, y=y)
        figures[f"{y}_by_{x}"] = pareto(frame, wanted, **options)
        for protocol in narrow if len(view.protocols) > 1 else ():
            figures[f"{y}_by_{x}_{protocol}"] = pareto(frame, replace(wanted, protocols=(protocol,)), **options)
    return figures
