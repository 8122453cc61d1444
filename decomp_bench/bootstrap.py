"""Document bootstrap: intervals of metrics, and paired intervals of differences, from per-document sums. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from decomp_bench.errors import UserError
from decomp_bench.metrics import CATALOGUE, UNINTERVALLED, Context, Metric, SiteInfo
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


def compare(first: pd.DataFrame, second: pd.DataFrame, bootstrap: int = 2000) -> pd.DataFrame:
    """Paired differences second - first of every metric that both have, with 95% intervals over the same resampled documents.

    The frames are two runs' documents.parquet. Raises UserError where they were not measured on the same tokens of the same target.
    """
    for key in ("target_hash", "token_hash", "split"):
        if set(first[key]) != set(second[key]):
            raise UserError(
                f"the runs differ in {key} ({first[key].iloc[0]} and {second[key].iloc[0]}): evaluate both on the same target and tokens"
            )
    rows = []
    for key, mine in _conditions(first).items():
        other = _conditions(second).get(key)
        if other is not None:
            rows += [
                dict(zip(("protocol", "gates", "mask", "delta"), key, strict=True)) | row for row in _differences(mine, other, bootstrap)
            ]
    if not rows:
        raise UserError("the runs share no condition (protocol and gates): evaluate both with the same eval config")
    return pd.DataFrame(rows)


def _conditions(data: pd.DataFrame) -> dict[tuple, pd.DataFrame]:
    """Trained condition -> its documents; for a run without training, the first of its sweep."""
    trained = data[data["curve"] == "trained"]
    return {key: group.drop_duplicates("doc").set_index("doc") for key, group in trained.groupby(["protocol", "gates", "mask", "delta"])}  # type: ignore[misc]


def _differences(first: pd.DataFrame, second: pd.DataFrame, bootstrap: int) -> list[dict[str, Any]]:
    shared = first.index.intersection(second.index)
    weights = resampled(len(shared), bootstrap)
    values = [_values(frame.loc[shared], weights) for frame in (first, second)]
    rows = []
    for key in values[0].keys() & values[1].keys():
        difference = values[1][key] - values[0][key]
        lo, hi = np.nanquantile(difference[1:], [0.025, 0.975])
        rows.append(
            {
                "metric": key,
                "first": values[0][key][0],
                "second": values[1][key][0],
                "difference": difference[0],
                "lo": lo,
                "hi": hi,
                "documents": len(shared),
            }
        )
    return sorted(rows, key=lambda row: list(CATALOGUE).index(row["metric"]))


def _values(frame: pd.DataFrame, weights: np.ndarray) -> dict[str, np.ndarray]:
    ctx = read_context(frame["context"].iloc[0])
    sums = {
        tuple(name.rsplit("@", 1)): weights @ frame[name].to_numpy() for name in frame.columns if "@" in name and frame[name].notna().all()
    }
    found = {key: evaluate_sums(m, sums, ctx) for key, m in CATALOGUE.items() if key not in UNINTERVALLED and m.task in ("both", ctx.task)}  # type: ignore[arg-type]
    return {key: values["all", "all"] for key, values in found.items() if ("all", "all") in values}
