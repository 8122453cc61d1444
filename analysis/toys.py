"""What is drawn of one run on a toy with known features: importances, components as matrices and as vectors in a plane, and neurons.

The figures are those that parameter decompositions are shown with (Bushnaq et al. 2025, SPD; Braun et al. 2025, APD).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.optimize import linear_sum_assignment

from .layout import TEXT, Entries, finish
from .style import COLOURS, GREY, plain

WIDTH, TOGETHER = 3.3, 2
"""Inches, and sites beside each other in a figure."""
COLUMNS = 256
"""Components that a heat map shows at most."""
ONE_SIDED = LinearSegmentedColormap.from_list("importance", ["#ffffff", COLOURS[0]])
TWO_SIDED = LinearSegmentedColormap.from_list("entries", [COLOURS[1], "#ffffff", COLOURS[0]])
NUMBERED = "Components are in the order of the features that they go with one to one (largest sum of importances), then by sum."
BY_SUM = "Components are in the order of their sums of importances."
Site = Mapping[str, Any]


def toy_figures(found: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures of what `decomp_bench.report.toy` found of a run, by name: importances, vectors, hidden_plane and neuron_contributions,
    each where there is something to draw, numbered where there are several."""
    made: dict[str, Figure] = {}
    sites: Sequence[Site] = found["sites"]
    for name, draw, own in (
        ("importances", _importances, [site for site in sites if site["importance"]]),
        ("vectors", _vectors, [site for site in sites if site["read"]]),
        ("hidden_plane", _plane, [site for site in sites if site["plane"]]),
    ):
        size = 1 if name == "vectors" else TOGETHER
        for number, start in enumerate(range(0, len(own), size)):
            key = name if len(own) <= size else f"{name}_{number + 1}"
            with plain():
                made[key] = draw(own[start : start + size], found["about"])
    if found["by_neuron"]:
        with plain():
            made["neuron_contributions"] = _contributions(found["by_neuron"], found["about"])
    return made


def order(importance: Float[np.ndarray, "f C"], dense: bool = False) -> np.ndarray:
    """Components in the order of the features that they go with under the best one-to-one assignment, then the rest by their sums; where
    features are meant to share components (`dense`), all by their sums."""
    if dense:
        return np.argsort(-importance.sum(0), kind="stable")[:COLUMNS]
    _, chosen = linear_sum_assignment(importance, maximize=True)
    rest = np.setdiff1d(np.arange(importance.shape[1]), chosen)
    return np.concatenate([chosen, rest[np.argsort(-importance[:, rest].sum(0), kind="stable")]])[:COLUMNS]


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), dpi=300)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.tick_params(labelsize=TEXT, length=2, pad=2, width=0.5)
        for spine in one.spines.values():
            spine.set_linewidth(0.5)
    return figure, axes


def _map(axes: Axes, values: Float[np.ndarray, "rows columns"], title: str, colours: LinearSegmentedColormap, ends: tuple[float, float]
         ) -> None:  # fmt: skip
    axes.imshow(values, aspect="auto", interpolation="none", cmap=colours, vmin=ends[0], vmax=ends[1], rasterized=True)
    axes.set_title(title, fontsize=TEXT, pad=3)
    axes.set_xlabel("component", fontsize=TEXT, labelpad=2)
    axes.locator_params(integer=True, nbins=4)


def _scale(colours: LinearSegmentedColormap, ends: tuple[float, float], title: str) -> Entries:
    shown = np.linspace(*ends, 5)
    patches = [Patch(facecolor=colours(place), edgecolor=GREY, linewidth=0.3) for place in np.linspace(0, 1, 5)]
    return Entries(title, list(patches), [f"{value:.2g}" for value in shown])


def _height(rows: int) -> float:
    return min(1.5, max(0.7, 0.08 * rows))


def _importances(sites: Sequence[Site], about: str) -> Figure:
    height = _height(max(len(site["importance"]) for site in sites))
    figure, axes = _panels(len(sites), height)
    for place, (one, site) in enumerate(zip(axes, sites, strict=True)):
        values = np.asarray(site["importance"], float)
        _map(one, values[:, order(values, site.get("dense", False))], site["name"], ONE_SIDED, (0, 1))
        one.set_ylabel("feature" if not place else "", fontsize=TEXT, labelpad=2)
        if place:
            one.set_yticks([])
    shared = ", ".join(site["name"] for site in sites if site.get("dense", False))
    numbered = f"{NUMBERED} {BY_SUM.replace('Components', f'Those of {shared}')}" if shared else NUMBERED
    text = f"Importance of each component when one feature alone is on (at {sites[0]['probe']:g}). {numbered} {about}"
    finish(figure, height, [_scale(ONE_SIDED, (0, 1), "Importance")], text, 0.42)
    return figure


def _vectors(sites: Sequence[Site], about: str) -> Figure:
    site = sites[0]
    read, write = (np.asarray(site[name], float) for name in ("read", "write"))
    dense = site.get("dense", False)
    chosen = order(np.asarray(site["importance"], float), dense) if site["importance"] else np.arange(min(len(read), COLUMNS))
    lengths = np.linalg.norm(read, axis=1) * np.linalg.norm(write, axis=1)
    size = np.sqrt(lengths)[:, None]  # both vectors of a component as long as each other: only their product is defined
    pair = [size * v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30) for v in (read, write)]
    height, most = _height(max(read.shape[1], write.shape[1])), max(float(np.abs(v).max()) for v in pair) or 1.0
    figure, axes = _panels(2, height)
    for one, vectors, name, of in zip(axes, pair, ("V", "U"), site["of"], strict=True):
        _map(one, vectors[chosen].T, f"{name}: {vectors.shape[1]} {of}", TWO_SIDED, (-most, most))
    what = f"{site['name']}: read (V) and write (U) vectors of each component, both with the square root of the component's length."
    finish(figure, height, [_scale(TWO_SIDED, (-most, most), "Entry")], f"{what} {BY_SUM if dense else NUMBERED} {about}", 0.42)
    return figure


def _plane(sites: Sequence[Site], about: str) -> Figure:
    height = 1.3
    figure, axes = _panels(len(sites), height)
    for place, (one, site) in enumerate(zip(axes, sites, strict=True)):
        target, own = (np.asarray(site["plane"][name], float) for name in ("target", "components"))
        for vectors, colour, width in ((target, GREY, 2.6), (own, COLOURS[1], 0.8)):
            for x, y in vectors:
                one.plot([0, x], [0, y], color=colour, linewidth=width, solid_capstyle="round", alpha=0.45 if colour == GREY else 1)
        one.plot(*own.T, linestyle="none", marker="o", markersize=1.8, color=COLOURS[1])
        edge = 1.1 * max(float(np.abs(np.concatenate([target, own])).max()), 1e-9)
        one.set_xlim(-edge, edge)
        one.set_ylim(-edge, edge)
        one.set_aspect("equal")
        one.locator_params(nbins=3)
        one.set_title(site["name"], fontsize=TEXT, pad=3)
        if place:
            one.set_yticklabels([])
    own_line = Line2D([], [], color=COLOURS[1], linewidth=0.8, marker="o", markersize=1.8)
    lines = [Line2D([], [], color=GREY, linewidth=2.6, alpha=0.45), own_line]
    text = f"The two hidden dimensions. Each component at the column of the feature that it is longest on. {about}"
    finish(figure, height, [Entries("Vectors", list(lines), ["target's columns", "components"])], text, 0.42)
    return figure


def _contributions(layers: Sequence[Mapping[str, Any]], about: str) -> Figure:
    height = 1.3
    figure, axes = _panels(len(layers), height)
    ends = [float(value) for layer in layers for name in ("target", "components") for value in (min(layer[name]), max(layer[name]))]
    low, high = min(ends), max(ends)
    edge = 0.05 * (high - low or 1)
    for place, (one, layer) in enumerate(zip(axes, layers, strict=True)):
        one.plot([low, high], [low, high], color=GREY, linewidth=0.5, zorder=1)
        one.plot(layer["target"], layer["components"], linestyle="none", marker="o", markersize=1.2, markeredgewidth=0, alpha=0.5,
                 color=COLOURS[0], rasterized=len(layer["target"]) > 2000)  # fmt: skip
        one.set_xlim(low - edge, high + edge)
        one.set_ylim(low - edge, high + edge)
        one.set_title(f"layer {layer['layer']}, r = {layer['correlation']:.3f}", fontsize=TEXT, pad=3)
        one.set_xlabel("target", fontsize=TEXT, labelpad=2)
        one.set_ylabel("component" if not place else "", fontsize=TEXT, labelpad=2)
        if place:
            one.set_yticklabels([])
    text = (
        "Neuron contributions: what each neuron adds to a feature's own output when the feature alone is on, in the target and in the "
        f"component with the largest one. Grey: equal. {about}"
    )
    marks = [Line2D([], [], color=COLOURS[0], linestyle="none", marker="o", markersize=2)]
    finish(figure, height, [Entries("Marks", list(marks), ["a neuron and a feature"])], text, 0.42)
    return figure
