"""Document bootstrap: intervals of metrics from per-document sums. Imports no torch."""

from __future__ import annotations

import json
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
