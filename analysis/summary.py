"""Tables and checks on a results frame: means with intervals, floors and controls at matched size, monotone curves, crossings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .curves import Curve, Overlap, at, curve, mean, overlap, roots, share_below_zero
from .intervals import describe, over_seeds, together
from .points import View, curves, points, rows, told_apart

NAMED = ["family", "origin", "kind", "protocol", "gates"]
TABLE = ["family", "variant", "kind", "trainable", "curve", "protocol", "gates", "metric", "base"]


class Comparison(NamedTuple):
    """
    A trained family against a floor or control of the same kind where their x ranges overlap (shares are of the overlap in log x).
    `lower` is where the family's y is lower, `clearly_lower` and `clearly_higher` where the intervals are apart as well.
    """

    family: str
    against: str
    role: str
    kind: str
    protocol: str
    gates: str
    verdict: str
    x_low: float
    x_high: float
    lower: float
    clearly_lower: float
    clearly_higher: float
    mean_difference: float
    converged: str


class Violation(NamedTuple):
    """Two points of a trained curve: more is active in the second, and it is worse beyond both intervals, by `excess`."""

    family: str
    kind: str
    protocol: str
    gates: str
    fewer: str
    more: str
    x_fewer: float
    x_more: float
    y_fewer: float
    y_more: float
    excess: float
    converged: str


class Crossing(NamedTuple):
    """Two curves of one kind that cross at these x; `clear` if either is lower beyond the intervals somewhere."""

    first: str
    second: str
    kind: str
    protocol: str
    gates: str
    at: tuple[float, ...]
    clear: bool


class Matched(NamedTuple):
    """
    What a curve is at one x, with its interval over seeds; `beyond` counts seeds whose curve does not reach that far. `origin` is the
    trained variant that a sweep at inference time is of.
    """

    family: str
    origin: str
    kind: str
    protocol: str
    gates: str
    mean: float
    lo: float
    hi: float
    seeds: int
    beyond: int
    converged: str


class Line(NamedTuple):
    """A curve, what it is called, and its points."""

    name: dict[str, str]
    points: pd.DataFrame
    curve: Curve


def table(frame: pd.DataFrame, metrics: Iterable[str] | None = None, view: View | None = None) -> pd.DataFrame:
    """
    One row per (family, variant, protocol, gates, metric, base): mean over seeds, interval and what it is. NaN and inapplicable values
    are counted in `left_out`. Uses the view's conditions, not its x and y. Raises ValueError with one line.
    """
    view, frame = view or View(), told_apart(frame)
    wanted = tuple(metrics) if metrics is not None else tuple(sorted(frame["metric"].dropna().unique()))
    data = rows(frame, wanted, view)
    values = data["value"].to_numpy(float, na_value=np.nan)
    finite = np.isfinite(values) & (data["applicable"] != "no").to_numpy(bool)
    groups = data.assign(left_out=~finite).groupby(TABLE)
    found = pd.DataFrame({"left_out": groups["left_out"].sum(), "converged": groups["converged"].agg(together)})
    found = found.join(over_seeds(data[finite], TABLE, "value", "lo", "hi"))
    found["seeds"] = found["seeds"].fillna(0).astype(int)
    found["interval"] = [describe([seeds]) if seeds else "" for seeds in found["seeds"].to_numpy(int).tolist()]
    return found.reset_index()[[*TABLE, "mean", "lo", "hi", "seeds", "interval", "left_out", "converged"]]


def _curves(frame: pd.DataFrame, view: View, wanted: tuple[str, ...] = ("trained", "floor")) -> Iterator[Line]:
    """The trained curves and floors of a frame."""
    data = points(frame, view).data
    for name, own in curves(data[data["curve"].isin(wanted)]):
        yield Line(name, own, curve(own))


def _pairs(frame: pd.DataFrame, view: View) -> Iterator[tuple[Line, Line, Overlap | None]]:
    """Pairs of curves that may be ranked together (one kind, protocol and gate source) and where both are known."""
    for one, other in combinations(_curves(frame, view), 2):
        if all(one.name[column] == other.name[column] for column in ("protocol", "gates", "kind")):
            yield one, other, overlap(one.curve, other.curve)


def _verdict(both: Overlap | None) -> dict[str, float | str]:
    """What the overlap of two curves says about the first."""
    if both is None:
        numbers = ("x_low", "x_high", "lower", "clearly_lower", "clearly_higher", "mean_difference")
        return {"verdict": "no overlap"} | dict.fromkeys(numbers, np.nan)
    difference = both.first.y - both.second.y
    lower, higher = share_below_zero(both.log_x, difference), share_below_zero(both.log_x, -difference)
    verdict = "crosses" if lower and higher else "wins" if lower else "loses" if higher else "ties"
    return {
        "verdict": verdict,
        "x_low": float(np.exp(both.log_x[0])),
        "x_high": float(np.exp(both.log_x[-1])),
        "lower": lower,
        "clearly_lower": share_below_zero(both.log_x, both.first.hi - both.second.lo),
        "clearly_higher": share_below_zero(both.log_x, both.second.hi - both.first.lo),
        "mean_difference": mean(both.log_x, difference),
    }


def floor_check(frame: pd.DataFrame, controls: Iterable[str] = (), view: View | None = None) -> list[Comparison]:
    """
    Every trained family against every floor (trainable false) and every family named in `controls`, at matched x: y is interpolated
    linearly in log x between separately trained points, never extrapolated. Lower y is better. Unknown controls raise ValueError.
    """
    controls = set(controls)
    if unknown := controls - set(frame["family"]):
        raise ValueError(f"no family {', '.join(sorted(unknown))} in the results (there are: {', '.join(sorted(set(frame['family'])))})")
    found = []
    for one, another, both in _pairs(frame, view or View()):
        for line, other, shared in ((one, another, both), (another, one, both and Overlap(both.log_x, both.second, both.first))):
            role = "floor" if other.name["curve"] == "floor" else "control" if other.name["family"] in controls else ""
            if not role or line.name["curve"] == "floor" or line.name["family"] in controls:
                continue
            names = {"family": line.name["family"], "against": other.name["family"], "role": role}
            names |= {column: line.name[column] for column in ("kind", "protocol", "gates")}
            values = names | _verdict(shared) | {"converged": together(line.points["converged"])}
            found.append(Comparison._make(values[field] for field in Comparison._fields))
    return sorted(found, key=lambda one: (one.role, one.against, one.kind, one.family, one.protocol, one.gates))


def matched(frame: pd.DataFrame, x: float, view: View | None = None, sweeps: bool = False) -> list[Matched]:
    """
    Every curve of trained variants or of a floor, or with `sweeps` of one checkpoint at inference time, at one x: y is interpolated
    linearly in log x, seed by seed, and never extrapolated. Intervals are those of `table`. A family that does not reach x with any seed
    has NaN and no seeds. Raises ValueError with one line.
    """
    wanted = ("inference", "floor") if sweeps else ("trained", "floor")
    read = [{"seed": seed, **one} for seed, own in frame.groupby("seed") for one in _readings(own, x, view or View(), wanted)]
    data = pd.DataFrame(read, columns=["seed", *NAMED, "y", "lo", "hi", "converged"])
    estimate = over_seeds(data.dropna(subset="y"), NAMED, "y", "lo", "hi")
    groups = data.groupby(NAMED)
    found = pd.DataFrame({"beyond": groups["y"].agg(lambda y: int(y.isna().sum())), "converged": groups["converged"].agg(together)})
    found = found.join(estimate).fillna({"seeds": 0}).astype({"seeds": int}).reset_index()
    return [Matched._make(row) for row in found[list(Matched._fields)].itertuples(index=False)]


def _readings(frame: pd.DataFrame, x: float, view: View, wanted: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Every curve of one seed at x, NaN beyond its ends."""
    place = np.array([np.log(x)])
    for line in _curves(frame, view, wanted):
        within = line.curve.log_x[0] <= place[0] <= line.curve.log_x[-1]
        found = [float(value[0]) for value in at(line.curve, place)[1:]] if within else [np.nan] * 3
        names = {name: line.name[name] for name in NAMED}
        yield names | dict(zip(("y", "lo", "hi"), found, strict=True)) | {"converged": together(line.points["converged"])}


def monotone_check(frame: pd.DataFrame, view: View | None = None) -> list[Violation]:
    """
    Within a trained curve, leaving out points that have not converged, more active must not be worse beyond the interval: each point
    is held against the earlier point with the lowest upper end. Points of unknown convergence are checked and say so.
    """
    violations = []
    for key, own, _ in _curves(frame, view or View(), ("trained",)):
        own = own[own["converged"] != "no"].sort_values("x", ignore_index=True)
        own = own.assign(y_lo=own["y_lo"].fillna(own["y"]), y_hi=own["y_hi"].fillna(own["y"]))
        for _, more in own.iterrows():
            earlier = own[own["x"] < more["x"]]
            if earlier.empty:
                continue
            fewer = earlier.loc[earlier["y_hi"].idxmin()]
            if (excess := more["y_lo"] - fewer["y_hi"]) > 0:
                names = [key[name] for name in ("family", "kind", "protocol", "gates")]
                values = [float(point[name]) for name in ("x", "y") for point in (fewer, more)]
                known = together(pd.Series([fewer["converged"], more["converged"]]))
                violations.append(Violation._make([*names, fewer["variant"], more["variant"], *values, float(excess), known]))
    return violations


def crossings(frame: pd.DataFrame, view: View | None = None) -> list[Crossing]:
    """Pairs of trained curves or floors, of one kind, protocol and gates, that change places where their x ranges overlap."""
    found = []
    for one, other, both in _pairs(frame, view or View()):
        places = roots(both.log_x, both.first.y - both.second.y) if both else []
        if both and places:
            apart = [share_below_zero(both.log_x, low.hi - high.lo) for low, high in ((both[1], both[2]), (both[2], both[1]))]
            names = [one.name["family"], other.name["family"], *(one.name[column] for column in ("kind", "protocol", "gates"))]
            found.append(Crossing._make([*names, tuple(float(np.exp(place)) for place in places), all(apart)]))
    return found
