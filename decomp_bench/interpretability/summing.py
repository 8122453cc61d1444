"""From scores of components to rows: means over components beside their controls, and every component by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from decomp_bench.bootstrap import interval
from decomp_bench.interpretability.harvest import Component, Place
from decomp_bench.results import condition

Scores = Mapping[str, Float[np.ndarray, "m k"]]


def mean_row(metric: str, values: Float[np.ndarray, " m"], label: Mapping[str, object], bootstrap: int, none: str) -> dict[str, Any]:
    """The mean over the components that have a value, with its interval over them, and how many have none."""
    there = values[np.isfinite(values)]
    reason = "" if len(there) == len(values) and len(values) else f"{len(there)} of {len(values)} components: {none}"
    about = {"condition": condition(component="all", **label, over="components"), "reason": reason}
    return {"metric": metric, **interval(there, bootstrap), **about}


def pool_rows(place: Place) -> Iterator[dict[str, Any]]:
    """Which share of a place's components could have been drawn."""
    where = condition(component="all", form=place.name, way="component", at="all", over="place")
    reason = "" if place.pool else "no component is active often enough, and seldom enough, on both folds"
    share = place.pool / place.whole if place.whole else math.nan
    yield {
        "metric": "interpretability_pool",
        "value": share,
        "lo": None,
        "hi": None,
        "n": place.whole,
        "condition": where,
        "reason": reason,
    }


def rows(
    place: Place, own: Scores, random: Scores, shifted: Scores, banded: Sequence[str], bands: int, bootstrap: int
) -> Iterator[dict[str, Any]]:
    """Means, gains above random directions, what chance comes to, by band, and each component."""
    none = "the others have too few examples"
    for name, values in own.items():
        for way, scores in (("component", values), ("random directions", random[name])):
            label = {"form": place.name, "way": way}
            yield mean_row(name, scores[:, 0], {**label, "at": "all"}, bootstrap, none)
            for band in range(bands if name in banded else 0):
                yield mean_row(name, scores[:, 1 + band], {**label, "at": (band + 0.5) / bands}, bootstrap, none)
            yield from each_row(name, place.components, scores[:, 0], label)
        whole = {"form": place.name, "way": "component", "at": "all"}
        yield mean_row(f"{name}_gain", values[:, 0] - random[name][:, 0], whole, bootstrap, none)
        yield mean_row(name, shifted[name][:, 0], {**whole, "way": "shifted"}, bootstrap, none)


def each_row(
    metric: str, components: Sequence[Component], values: Float[np.ndarray, " m"], label: Mapping[str, object]
) -> Iterator[dict[str, Any]]:
    """One row for each component."""
    for one, value in zip(components, values.tolist(), strict=True):
        about = {"site": one.site.name, "layer": str(one.site.layer), "n": 1}
        reason = "" if math.isfinite(value) else "no value"
        where = condition(component=one.name, **label, at="all", density=float(one.density))
        yield {"metric": metric, "value": value, "lo": None, "hi": None, "condition": where, "reason": reason, **about}
