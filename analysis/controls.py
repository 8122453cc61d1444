"""Does a metric tell a decomposition from junk: each metric of a run beside the same metric of its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from decomp_bench.results import unfolded

from .intervals import describe, over_seeds
from .layout import TEXT, Entries, canvas, finish
from .points import tidy
from .style import GREY, Style, plain, styles

REAL = "none"
ENTRY = ["family", "kind", "trainable", "metric", "better", "control"]
SHARED = ("target", "dataset", "split", "protocol")
TELLS, BLIND, FOOLED, DIFFERS, SAME, OPEN = "tells", "blind", "fooled", "differs", "same", "n/a"
DRAWN = ("ce_delta", "kl", "agreement", "ce_recovered_mean", "fvu", "output_mse")
"""Metrics that have a figure of their own; the others are in the table of verdicts and the one of values."""
ROW, LEFT = 0.155, 1.25  # inches


def compared(frame: pd.DataFrame) -> pd.DataFrame:
    """
    One row for each (family, metric, control): mean, lo, hi, the same of the run as `real...`, seeds, reason and the verdict: `tells`
    where the run is better and the intervals are apart, `fooled` where it is worse and they are, else `blind`; of metrics without a
    better direction `differs` or `same`; `n/a` where a value or an interval is missing. Raises ValueError where there is nothing.
    """
    data = unfolded(tidy(frame))
    if "control" not in data or not (data["control"] == REAL).any():
        raise ValueError("nothing to compare: no run was measured with its controls")
    means = over_seeds(data, ENTRY, "value", "lo", "hi").join(data.groupby(ENTRY)["reason"].first()).reset_index()
    real = means[means["control"] == REAL].drop(columns=["control", "reason", "seeds"])
    names = {"mean": "real", "lo": "real_lo", "hi": "real_hi"}
    both = means[means["control"] != REAL].merge(real.rename(columns=names), on=[c for c in ENTRY if c != "control"], how="inner")
    both = both[both["real"].notna()].reset_index(drop=True)
    return both.assign(verdict=[_verdict(row) for _, row in both.iterrows()])


def _verdict(row: pd.Series) -> str:
    if not np.isfinite([row[name] for name in ("lo", "hi", "real_lo", "real_hi")]).all():
        return OPEN
    higher, lower = row["real_lo"] > row["hi"], row["real_hi"] < row["lo"]
    if row["better"] not in ("higher", "lower"):
        return DIFFERS if higher or lower else SAME
    better, worse = (higher, lower) if row["better"] == "higher" else (lower, higher)
    return TELLS if better else FOOLED if worse else BLIND


def control_rows(frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    """One row for each family and metric: the run, and each control with its verdict."""
    found, rows = compared(frame), []
    for (family, metric), own in found.groupby(["family", "metric"], sort=False):
        first = own.iloc[0]
        row: dict[str, object] = {"family": family, "metric": metric, "better": first["better"]}
        row["run"] = _written(first["real"], first["real_lo"], first["real_hi"])
        for one in own.to_dict("records"):
            value = _written(one["mean"], one["lo"], one["hi"])
            row[one["control"]] = f"{value} {one['verdict']}".strip() if value else (one["reason"] or OPEN)
        rows.append(row)
    return rows


def _written(value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:.3g} [{low:.3g}, {high:.3g}]" if np.isfinite(low) else f"{value:.3g}"


def control_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """The verdicts of all metrics, and one figure each for those of `DRAWN` that are there."""
    found, text = compared(frame), _about(frame)
    figures = {"controls_verdicts": verdicts(found, text)}
    for metric in DRAWN:
        own = found[(found["metric"] == metric) & found["real"].notna()]
        if len(own):
            figures[f"controls_{metric}"] = beside(own, styles(frame), text)
    return figures


def _about(frame: pd.DataFrame) -> str:
    data = tidy(frame)
    data = data[data["condition"].str.startswith(f"control={REAL}")]
    facts = {name: ", ".join(sorted(set(data[name]))) for name in (*SHARED, "gates", "token_hash")}
    seeds = data.groupby(["family", "metric"])["seed"].nunique()
    return (
        f"Target {facts['target']}; {facts['dataset']}, {facts['split']} split (tokens {facts['token_hash'][:8]}), "
        f"{int(data['n'].max()):,} scored tokens; protocol {facts['protocol']}, gates {facts['gates']}. "
        f"Intervals: {describe([int(seeds.min()), int(seeds.max())])}."
    )


# ---- one metric


def beside(own: pd.DataFrame, looks: Mapping[tuple[str, str], Style], text: str) -> Figure:
    """One metric, 3.3 inches wide: for each family the run, filled, and below it each control, hollow; the dotted line is the run."""
    metric, place = str(own["metric"].iloc[0]), 0.0
    labels: dict[float, str] = {}
    with plain():
        height = ROW * (own["family"].nunique() * 2.0 + len(own) + 0.4)
        figure = canvas(1, 3.3, height)
        axes = figure.axes[0]
        for (family, kind), rows in own.groupby(["family", "kind"], sort=False):
            style, place = looks[str(family), str(kind)], place + 2.0
            first = rows.iloc[0]
            _point(axes, first["real"], first["real_lo"], first["real_hi"], place, style, True)
            top, labels[place] = place, style.label
            for one in rows.to_dict("records"):
                place += 1.0
                labels[place] = f"{one['control']}{'' if np.isfinite(one['mean']) else ' (n/a)'}"
                _point(axes, one["mean"], one["lo"], one["hi"], place, style, False)
            axes.plot([first["real"]] * 2, [top, place], color=style.colour, linewidth=0.5, linestyle=":", zorder=1)
        axes.set_ylim(place + 0.8, 1.0)
        axes.set_yticks(list(labels), list(labels.values()), fontsize=TEXT)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        values = own[["mean", "real"]].to_numpy(float)
        if np.nanmin(values) > 0 and np.nanmax(values) > 10 * np.nanmin(values):
            axes.set_xscale("log")
        axes.set_xlabel(f"{metric} ({first['better']} is better)", fontsize=TEXT + 0.5, labelpad=2)
        finish(figure, height, [_legend()], f"{metric} of each run and of its controls. {text}", LEFT)
    return figure


def _point(axes: Axes, value: float, low: float, high: float, place: float, style: Style, real: bool) -> None:
    if not np.isfinite(value):
        return
    if np.isfinite([low, high]).all():
        axes.plot([low, high], [place, place], color=style.colour, linewidth=1.2 if real else 0.8, solid_capstyle="butt", zorder=3)
    point = axes.plot(value, place, linestyle="none", marker=style.marker, markersize=(3.6 if real else 2.8) * style.size)[0]
    point.set(color=style.colour, markerfacecolor=style.colour if real else "white", markeredgewidth=0.6, zorder=4)
    point.set_gid(f"{'run' if real else 'control'}/{style.label}/{place:g}")


def _legend() -> Entries:
    shown = [("the run", "#333333"), ("its controls", "white")]
    marks = [Line2D([], [], color="#333333", marker="o", linestyle="none", markersize=3.2, markerfacecolor=face) for _, face in shown]
    return Entries("Marks", list(marks), [name for name, _ in shown])


# ---- all metrics


def verdicts(found: pd.DataFrame, text: str) -> Figure:
    """
    A line for each metric that has a better direction, a column for each control: in how many families the metric tells the run from
    the control, of those where both have intervals; the darker, the more. 3.3 inches wide.
    """
    data = found[found["better"].isin(["higher", "lower"]) & found["mean"].notna()]
    if data.empty:
        raise ValueError("nothing to compare: no metric with a better direction has values")
    metrics, controls = list(dict.fromkeys(data["metric"])), list(dict.fromkeys(data["control"]))
    height = ROW * len(metrics)
    with plain():
        figure = canvas(1, 3.3, height)
        axes = figure.axes[0]
        for y, metric in enumerate(metrics):
            for x, control in enumerate(controls):
                own = data[(data["metric"] == metric) & (data["control"] == control)]
                _cell(axes, x, y, own)
        axes.set_xlim(-0.5, len(controls) - 0.5)
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.set_yticks(range(len(metrics)), metrics, fontsize=TEXT)
        axes.set_xticks(range(len(controls)), [name.replace(" ", "\n") for name in controls], fontsize=TEXT)
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        said = "Families in which the metric tells a run from its control (better, and the intervals apart), of those with intervals; "
        finish(figure, height, [], f"{said}! : worse than the control in some, intervals apart. {text}", LEFT)
    return figure


def _cell(axes: Axes, x: int, y: int, own: pd.DataFrame) -> None:
    known = own[own["verdict"] != OPEN]
    share = float((known["verdict"] == TELLS).mean()) if len(known) else 0.0
    shade = 1 - 0.75 * share
    face = (shade * 0.85, 0.4 + 0.6 * shade, 0.7 + 0.3 * shade) if len(known) else "#f2f2f2"
    axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=face, linewidth=0))
    fooled = "!" if (known["verdict"] == FOOLED).any() else ""
    words = f"{int((known['verdict'] == TELLS).sum())}/{len(known)}{fooled}" if len(known) else "–"
    artist = axes.text(x, y, words, fontsize=TEXT, ha="center", va="center", color="white" if share > 0.6 else "#222222")
    artist.set_gid(f"verdict/{y}/{x}" if len(known) else GREY)
