"""Tails: what components beyond a rank contribute, and what the largest tokens hold of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from decomp_bench.results import unfolded

from .intervals import describe, over_seeds
from .layout import TEXT, Entries, canvas, finish
from .points import tidy
from .style import COLOURS, GREY, GROUPS, plain, styles

LABELS = {
    "tail_share": ("Contributions beyond the rank", "Share of sum |strength| |write vector| beyond the r largest components of a token"),
    "tail_active": ("Active beyond the rank", "Share of the components that are let through which lie beyond the r largest of a token"),
}
MARKS = {"in": "o", "out": "s"}
HEIGHT = 1.9


def tail_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """Both shares by rank, and the target's tokens by layer; raises ValueError where there is nothing to draw."""
    data = unfolded(tidy(frame))
    figures = {f"tails_{key.removeprefix('tail_')}": by_rank(data, key) for key in LABELS if (data["metric"] == key).any()}
    if (data["metric"] == "token_share").any():
        figures["tails_tokens"] = by_layer(data)
    if not figures:
        raise ValueError("nothing to draw: no run has its tails measured")
    return figures


def tail_rows(frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    """One row for each family: what lies beyond each rank, mean over sites."""
    data = unfolded(tidy(frame))
    found = []
    for metric in LABELS:
        means = _means(data[(data["metric"] == metric) & (data["site"] == "all")], ["family", "variant", "rank"])
        for (family, variant), own in means.groupby(["family", "variant"], sort=False):
            row: dict[str, object] = {"family": family, "variant": variant, "metric": metric}
            for one in own.sort_values("rank").to_dict("records"):
                row[f"> {one['rank']:g}"] = "" if not np.isfinite(one["mean"]) else f"{one['mean']:.3f}"
            found.append(row)
    return found


def _means(own: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean over seeds with its interval; ranks, shares and layers as numbers."""
    numbers = {name: own[name].astype(float) for name in ("rank", "share") if name in by}
    return over_seeds(own.assign(**numbers), by, "value", "lo", "hi").reset_index()


def _about(own: pd.DataFrame, bars: str) -> str:
    facts = {name: ", ".join(sorted(set(own[name]))) for name in ("target", "dataset", "split", "token_hash")}
    return (
        f"Target {facts['target']}; {facts['dataset']}, {facts['split']} split (tokens {facts['token_hash'][:8]}), "
        f"{int(own['n'].max()):,} documents; clean activations, positions {own['positions'].iloc[0]}. Bars: {bars}."
    )


def by_rank(data: pd.DataFrame, metric: str) -> Figure:
    """A share by rank, a line for each family, mean over sites, 3.3 inches wide."""
    own = data[(data["metric"] == metric) & (data["site"] == "all")]
    means, looks = _means(own, ["family", "kind", "variant", "rank"]), styles(own)
    label, said = LABELS[metric]
    with plain():
        figure = canvas(1, 3.3, HEIGHT)
        axes = figure.axes[0]
        groups: dict[str, Entries] = {name: Entries(title, [], []) for name, title in GROUPS.items()}
        for (family, kind, variant), line in means.groupby(["family", "kind", "variant"], sort=False):
            style, line = looks[str(family), str(kind)], line.sort_values("rank")
            drawn = _line(axes, line["rank"], line, style.colour, style.marker, "-", 3.0 * style.size)
            drawn.set_gid(f"{metric}/{family}/{variant}")
            groups[style.group].handles.append(Line2D([], [], color=style.colour, marker=style.marker, markersize=3.0, linewidth=0.9))
            groups[style.group].labels.append(style.label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("Rank r among the components of a token", fontsize=TEXT + 0.5, labelpad=2)
        axes.set_ylabel(label, fontsize=TEXT + 0.5, labelpad=2)
        text = f"{said}, mean over sites. {_about(own, describe([int(n) for n in means['seeds']]))}"
        finish(figure, HEIGHT, [entries for entries in groups.values() if entries.handles], text)
    return figure


def _line(axes: Axes, x: pd.Series, line: pd.DataFrame, colour: str, marker: str, dashes: str, size: float) -> Line2D:
    ends = np.clip(np.nan_to_num(np.stack([line["mean"] - line["lo"], line["hi"] - line["mean"]])), 0, None)
    axes.errorbar(x, line["mean"], yerr=ends, fmt="none", ecolor=colour, elinewidth=0.6, zorder=2)
    drawn = axes.plot(x, line["mean"], color=colour, linewidth=0.9, linestyle=dashes, marker=marker, markersize=size, zorder=3)[0]
    return drawn


def by_layer(data: pd.DataFrame) -> Figure:
    """What the largest tokens hold of each layer's squared norm, of MLP inputs and outputs, 3.3 inches wide."""
    own = data[data["metric"] == "token_share"].drop_duplicates(["layer", "site", "share"])
    means = _means(own.assign(layer=own["layer"].astype(int)), ["site", "share", "layer"])
    shares = sorted(set(means["share"]), reverse=True)
    with plain():
        figure = canvas(1, 3.3, HEIGHT)
        axes = figure.axes[0]
        marks = Entries("Tokens; MLP inputs (round, dashed) and outputs (square)", [], [])
        for colour, share in zip((*COLOURS, GREY), shares, strict=False):
            for end, marker in MARKS.items():
                line = means[(means["share"] == share) & (means["site"] == end)].sort_values("layer")
                drawn = _line(axes, line["layer"], line, colour, marker, "--" if end == "in" else "-", 3.0)
                drawn.set_gid(f"token_share/{end}/{share:g}")
            marks.handles.append(Line2D([], [], color=colour, linewidth=0.9))
            marks.labels.append(f"largest {100 * share:g}%")
        axes.set_xticks(sorted(set(means["layer"])))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("Layer", fontsize=TEXT + 0.5, labelpad=2)
        axes.set_ylabel("Share of the squared norm", fontsize=TEXT + 0.5, labelpad=2)
        text = f"What the tokens of the largest norms hold of a layer's squared norm. {_about(own, '95% document bootstrap')}"
        finish(figure, HEIGHT, [marks], text)
    return figure
