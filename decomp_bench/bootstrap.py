"""Document bootstrap: intervals of metrics from per-document sums. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from decomp_bench.metrics import Context, Metric, SiteInfo
from decomp_bench.metrics.base import Sums, Values

SEED = 0
KEYS = [
    "method",
    "family",
    "variant",
    "curve",
    "kind",
    "target",
    "target_hash",
    "token_hash",
    "split",
    "layers",
    "protocol",
    "gates",
    "mask",
    "delta",
]


def resampled(documents: int, replicates: int) -> np.ndarray:
    """Weights [1 + replicates, documents]: the documents as they are, then how often each is drawn in a resample of the same size."""
    draws = np.random.default_rng(SEED).multinomial(documents, np.full(documents, 1 / documents), size=replicates)
    return np.concatenate([np.ones((1, documents)), draws.astype(float)])


def spread(replicates: np.ndarray, n: int) -> dict[str, Any]:
    """value (the first), lo and hi (95% of its resamples, the others) and n; no interval where over a fortieth of them is undefined."""
    rest = replicates[1:][np.isfinite(replicates[1:])]
    lo, hi = np.quantile(rest, [0.025, 0.975]) if len(rest) >= max(1.0, 0.975 * (len(replicates) - 1)) else (math.nan, math.nan)
    return {"value": float(replicates[0]), "lo": float(lo), "hi": float(hi), "n": n}


def interval(values: np.ndarray, replicates: int) -> dict[str, Any]:
    """The mean of independent values, such as one a prompt, with its bootstrap interval, which takes two; NaN where there is none."""
    if len(values) < 2:
        return {"value": float(values[0]) if len(values) else math.nan, "lo": math.nan, "hi": math.nan, "n": len(values)}
    return spread(resampled(len(values), replicates) @ values / len(values), len(values))


def evaluate_sums(metric: Metric, sums: Sums, ctx: Context) -> Values:
    """A metric's values, or none where the quantities it is made of were not measured."""
    try:
        return metric.compute(sums, ctx)
    except KeyError:
        return {}


def documents_frame(arrays: dict[tuple[str, str], np.ndarray], ctx: Context, about: dict[str, Any]) -> pd.DataFrame:
    """One row for each document: the condition, the sums (columns `quantity@part`), and the context that metrics need, as JSON."""
    data = pd.DataFrame({f"{quantity}@{part}": value for (quantity, part), value in sorted(arrays.items())})
    data = data[data["tokens@all"] > 0]
    head = pd.DataFrame({"doc": data.index, **{key: about[key] for key in KEYS}, "context": json.dumps(asdict(ctx))}, index=data.index)
    return pd.concat([head, data], axis=1)


def read_context(text: str) -> Context:
    """The context that `documents_frame` wrote."""
    data = json.loads(text)
    sites = tuple(SiteInfo(**site) for site in data.pop("sites"))
    return Context(**{**data, "sites": sites, "layers": tuple(data["layers"])})
