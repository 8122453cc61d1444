"""Captions written from the rows that a figure draws."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from .intervals import describe
from .labels import Measure, measure
from .points import Points, View


def _range(values: pd.Series) -> str:
    """A count, or the smallest and the largest."""
    few, many = int(values.min()), int(values.max())
    return f"{few:,}" if few == many else f"{few:,} to {many:,}"


def _short(value: str) -> str:
    """The beginning of a hash."""
    return value[:8] if len(value) > 12 else value


def _conditions(found: Points, view: View) -> str:
    """Target, data and protocol."""
    facts = found.facts
    gates = {"clean": "clean", "self": "self (lighter)"}
    drawn = [gates.get(name, name) for name in view.gates if (found.data["gates"] == name).any()]
    plural = "s" if len(view.protocols) > 1 else ""
    return (
        f"Target {facts['target']} ({_short(facts['target_hash'])}), layers {facts['layers']}; "
        f"{facts['dataset']}, {view.split} split (tokens {_short(facts['token_hash'])}), {_range(found.data['n'])} scored tokens, "
        f"positions {facts['positions']}" + (f"; layer {view.layer}" if view.layer != "all" else "") + ". "
        f"Protocol{plural} {', '.join(view.protocols)}; gates {' and '.join(drawn)}; mask {view.mask}; weight delta {view.delta}."
    )


def _marks(found: Points, coincide: bool, sweeps: str) -> str:
    """What the legend does not say about lines and markers, as far as they occur."""
    data = found.data
    notes = []
    if sweeps != "none" and (data["curve"] == "inference").any():
        which = "the middle checkpoint of each family" if sweeps == "middle" else "single checkpoints"
        notes.append(f"dashed: inference sweeps of {which}")
    trainable = data[data["curve"] != "floor"]
    if (trainable["converged"] == "no").any():
        notes.append("hollow: a run had not converged")
    if unknown := int((trainable["converged"] == "unknown").sum()):
        notes.append(f"convergence unknown at {unknown} filled points")
    if coincide:
        notes.append("curves equal for both gates are drawn once, as clean")
    return _sentence("; ".join(notes))


def _sentence(text: str) -> str:
    """With a capital and a full stop, empty for nothing."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _left_out(found: Points) -> str:
    """What could not be drawn."""
    parts = [f"{count} {reason}" for reason, count in found.left_out.items()]
    notes = f"Run points left out: {', '.join(parts)}." if parts else ""
    absent = f"Not drawn at all: {found.facts['absent']}." if found.facts.get("absent") else ""
    return " ".join(note for note in (notes, absent) if note)


def caption(
    found: Points,
    view: View,
    *,
    sweeps: str = "none",
    coincide: bool = False,
    scale: str = "",
    measures: Mapping[str, Measure] | None = None,
) -> str:
    """The caption of a Pareto figure: metrics, conditions, marks, seeds, interval and what was left out, all from the rows."""
    x, y = measure(view.x, measures), measure(view.y, measures)
    versions = f"metric versions {view.y} {found.facts['y_version']}, {view.x} {found.facts['x_version']}"
    bars = found.data[["y_lo", "y_hi", "x_lo", "x_hi"]].isna().any(axis=1).sum()
    seeds = f"Points: mean over seeds ({_range(found.data['seeds'])}); bars in x and y: {describe(found.data['seeds'].tolist())}"
    missing = f"; {bars} points without a complete interval" if bars else ""
    sentences = [
        _sentence(f"{y.label}: {y.definition}; against {x.label}: {x.definition} ({versions})"),
        _conditions(found, view),
        _marks(found, coincide, sweeps),
        f"{seeds}{missing}.",
        scale,
        _left_out(found),
    ]
    return " ".join(sentence for sentence in sentences if sentence)
