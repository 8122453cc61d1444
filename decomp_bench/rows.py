"""From summed quantities to rows of the results schema."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from decomp_bench.ablation import Arrays
from decomp_bench.bootstrap import evaluate_sums
from decomp_bench.conditions import GLOBAL_GATE, Condition, columns, same_gates, view_of
from decomp_bench.config import EvalConfig
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer, Site
from decomp_bench.metrics import CATALOGUE, UNINTERVALLED, Context, SiteInfo
from decomp_bench.replacement import unit_of


def context(decomposer: Decomposer, condition: Condition, alive: dict[str, int], bits: float) -> Context:
    """What the accounting needs to know of a decomposer under a condition."""
    view = view_of(decomposer, condition)
    writes = {slot.write for site in view.sites for slot in site.slots if ".mlp." in slot.write}
    return Context(
        view.layers,
        tuple(_site_info(site) for site in view.sites),
        view.target.task,
        condition.protocol,
        float(sum(view.constant_size(w) for w in writes)),
        float(sum(view.constant_coefficients(w) for w in writes)),
        bits,
        alive,
    )


def _site_info(site: Site) -> SiteInfo:
    units = {unit_of(slot.write) for slot in site.slots}
    return SiteInfo(site.name, site.layer, next(iter(units)).split(".")[1], site.n, len(units))


def describe(decomposer: Decomposer, source: Source, config: EvalConfig, token_hash: str) -> dict[str, Any]:
    """The columns that all rows of a decomposer share."""
    return {
        "method": decomposer.name,
        "kind": decomposer.kind,
        "trainable": decomposer.trainable,
        "family": decomposer.family + (f" ({decomposer.origin})" if decomposer.origin else ""),
        "target": source.target.uri,
        "target_hash": source.target.identity,
        "dataset": source.name,
        "token_hash": token_hash,
        "split": config.split,
        "layers": ",".join(map(str, decomposer.layers)),
        "init": decomposer.init,
        "positions": "1:" if source.target.keeps_first else "all",
    }


def rows_of(arrays: Arrays, live: dict, ctx: Context, weights: np.ndarray, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Every applicable metric of one condition, by layer and site."""
    tokens = int(arrays["tokens", "all"].sum())
    sums = {key: weights @ value for key, value in arrays.items()}
    counts = {key: np.array([value]) for key, value in live.items()}
    rows = []
    for metric in CATALOGUE.values():
        if metric.task not in ("both", ctx.task):
            continue
        values = evaluate_sums(metric, counts if metric.key in UNINTERVALLED else sums, ctx)
        for (layer, site), value in values.items():
            rows.append(about | _row(metric.key, value) | {"layer": layer, "site": site, "n": tokens})
    return rows


def _row(key: str, value: np.ndarray) -> dict[str, Any]:
    """Point estimate and 95% percentile interval; NaN is not applicable, with the metric's reason."""
    metric, point = CATALOGUE[key], float(value[0])
    spread = np.nanquantile(value[1:], [0.025, 0.975]) if len(value) > 1 and np.isfinite(value[1:]).any() else (math.nan, math.nan)
    missing = not math.isfinite(point)
    return {
        "metric": key,
        "metric_version": metric.version,
        "value": point,
        "lo": float(spread[0]),
        "hi": float(spread[1]),
        "applicable": "no" if missing else "yes",
        "reason": (metric.needs or "not finite") if missing else "",
        "base": key.rsplit("_", 1)[1] if key.startswith("ce_recovered") else "",
    }


def not_applicable(decomposer: Decomposer, config: EvalConfig, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that say why gates from the replaced stream do not exist."""
    return [
        about | columns(decomposer, Condition(p, "self")) | _missing(key)
        for p in config.protocols
        if not same_gates(decomposer, p)
        for key in CATALOGUE
    ]


def _missing(key: str) -> dict[str, Any]:
    return {
        "metric": key,
        "metric_version": CATALOGUE[key].version,
        "value": math.nan,
        "applicable": "no",
        "reason": GLOBAL_GATE,
        "layer": "all",
        "site": "all",
    }
