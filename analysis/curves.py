"""Curves that are linear in log x between their points, never beyond them: what tables of matched sparsity are computed from."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd


class Curve(NamedTuple):
    """Log x in increasing order, y and the ends of its interval (y itself where there is none)."""

    log_x: np.ndarray
    y: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


class Overlap(NamedTuple):
    """Two curves on the knots of both within their common range; `log_x` has one entry where the ranges touch in a point."""

    log_x: np.ndarray
    first: Curve
    second: Curve


def curve(data: pd.DataFrame) -> Curve:
    """The curve through these points; points of equal x are averaged."""
    known = data.assign(y_lo=data["y_lo"].fillna(data["y"]), y_hi=data["y_hi"].fillna(data["y"]))
    mean = known.groupby("x")[["y", "y_lo", "y_hi"]].mean().sort_index()
    return Curve(np.log(mean.index.to_numpy(float)), *(mean[name].to_numpy(float) for name in ("y", "y_lo", "y_hi")))


def at(line: Curve, log_x: np.ndarray) -> Curve:
    """The curve at other places, which must lie within its range."""
    return Curve(log_x, *(np.interp(log_x, line.log_x, values) for values in line[1:]))


def overlap(first: Curve, second: Curve) -> Overlap | None:
    """Both curves on their common range, None where they have none."""
    low, high = max(first.log_x[0], second.log_x[0]), min(first.log_x[-1], second.log_x[-1])
    if low > high:
        return None
    knots = np.unique(np.concatenate([[low, high], first.log_x, second.log_x]))
    knots = knots[(knots >= low) & (knots <= high)]
    return Overlap(knots, at(first, knots), at(second, knots))


def share_below_zero(log_x: np.ndarray, values: np.ndarray) -> float:
    """The share of the range where a function that is linear between its knots is negative."""
    if len(log_x) == 1:
        return float(values[0] < 0)
    left, right = np.minimum(values[:-1], 0), np.minimum(values[1:], 0)
    span = np.abs(values[:-1]) + np.abs(values[1:])
    crosses = values[:-1] * values[1:] < 0
    part = np.where(crosses, np.abs(left + right) / np.where(span == 0, 1, span), (left + right < 0).astype(float))
    return float(np.average(part, weights=np.diff(log_x)))


def mean(log_x: np.ndarray, values: np.ndarray) -> float:
    """The mean over the range of a function that is linear between its knots."""
    if len(log_x) == 1:
        return float(values[0])
    return float(np.average((values[:-1] + values[1:]) / 2, weights=np.diff(log_x)))


def roots(log_x: np.ndarray, values: np.ndarray) -> list[float]:
    """Where the function changes its sign (a touch is no change)."""
    places = []
    signed = np.flatnonzero(values)
    for left, right in pairwise(signed):
        if values[left] * values[right] < 0:
            inner = left + 1 < right  # exactly zero in between
            weight = values[left] / (values[left] - values[right])
            places.append(float(log_x[left + 1] if inner else log_x[left] + weight * (log_x[right] - log_x[left])))
    return places
