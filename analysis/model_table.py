"""One table of every run: what it is, what it cost, what it keeps under each protocol. From results and manifests alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from .points import PROTOCOLS, View, tidy
from .summary import table

KEYS = ["target", "target_hash", "dataset", "token_hash", "split", "positions", "layers"]
"""What rows have to share to be compared; the table is sorted by it."""
SIZES = ("alive", "dead", "dense", "l0_mlp", "active_params", "bits")
FIDELITY = ("ce_delta", "ce_recovered_mean", "kl", "output_mse", "fvu")
COSTS = {
    "train_tokens": "tokens",
    "flops": "flops",
    "wall_s": "train_wall_s",
    "cpu_s": "train_cpu_s",
    "memory_mb": "peak_memory_mb",
    "evaluate_s": "evaluate_wall_s",
}
HEADLINE = ("cascading", "clean")
"""Protocol and gates under which components are counted."""
Manifests = Mapping[str, Mapping[str, Any]]


def model_table(frame: pd.DataFrame, manifests: Manifests) -> pd.DataFrame:
    """
    One row for each training setup of `frame` (runs that differ in their seed only), as it was trained: sizes under cascading with gates
    of the clean pass; `METRIC PROTOCOL GATES` with `... lo` and `... hi`; costs as means over seeds. Raises ValueError where there is none.
    """
    data = tidy(frame)
    data = data[(data["curve"] == "trained") & (data["mask"] == "binary") & (data["delta"] == "off")]
    data = data.assign(setup=[setup(run, manifests) for run in data["run_id"]])
    found = [_row(own, manifests) for _, own in data.groupby([*KEYS, "setup"])]
    if not found:
        raise ValueError("no runs at hand: run an experiment first, such as decomp-bench experiment run 000")
    made = pd.DataFrame(found)
    order = [*KEYS, "kind", "family", *(name for name in ("l0_mlp",) if name in made), "variant", "setup"]
    rising = [name != "kind" for name in order]  # replacements before what sees y
    return made.sort_values(order, ascending=rising, ignore_index=True).dropna(axis=1, how="all")


def setup(run: str, manifests: Manifests) -> str:
    """A hash of what a run's config holds beside its seed and how it was executed."""
    config = dict(manifests.get(run, {}).get("config") or {"run": run})
    kept = {key: value for key, value in config.items() if key not in ("seed", "train")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _row(own: pd.DataFrame, manifests: Manifests) -> dict[str, Any]:
    whole = own[(own["layer"] == "all") & (own["site"] == "all")]
    first, runs = whole.iloc[0], [manifests.get(run, {}) for run in dict.fromkeys(own["run_id"])]
    row = {name: first[name] for name in [*KEYS, "method", "family", "kind", "variant", "condition", "setup"]}
    row |= {"seeds": len(set(own["seed"])), "tokens": int(whole["n"].max()), "steps": int(whole["step"].max())}
    row |= {"components": _components(own), "parameters": _mean([one.get("parameters") for one in runs])}
    row |= dict(_values(whole))
    row |= {name: _mean([(one.get("cost") or {}).get(key) for one in runs]) for name, key in COSTS.items()}
    return row


def _values(whole: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """Every metric under every condition with its interval; the sizes under the headline condition alone."""
    metrics = [key for key in (*SIZES, *FIDELITY) if key in set(whole["metric"])]
    view = View(protocols=tuple(name for name in PROTOCOLS if name in set(whole["protocol"])), split=str(whole["split"].iloc[0]))
    found = table(whole, metrics, view)
    yield "interval", found["interval"].iloc[0]
    yield "converged", found["converged"].iloc[0]
    counted = _headline(found)
    for one in found.itertuples(index=False):
        if one.metric in FIDELITY:
            name = f"{one.metric} {one.protocol} {one.gates}"
            yield from ((name, one.mean), (f"{name} lo", one.lo), (f"{name} hi", one.hi))
        elif (one.protocol, one.gates) == counted:
            yield str(one.metric), one.mean


def _headline(found: pd.DataFrame) -> tuple[str, str]:
    """The headline condition, or the first there is where a run has none of it."""
    there = list(dict.fromkeys(found[["protocol", "gates"]].itertuples(index=False, name=None)))
    return HEADLINE if HEADLINE in there else there[0]


def _components(own: pd.DataFrame) -> float:
    """Components of all sites, from how many are alive and which share is not; NaN where a site has none alive."""
    sites = own[(own["site"] != "all") & own["metric"].isin(["alive", "dead"])]
    sites = sites[sites["run_id"] == sites["run_id"].iloc[0]] if len(sites) else sites
    counts = sites.groupby(["site", "metric"])["value"].first().unstack()
    if not {"alive", "dead"} <= set(counts):
        return float("nan")
    alive, share = counts["alive"].to_numpy(float), 1 - counts["dead"].to_numpy(float)
    sizes = np.divide(alive, share, out=np.full_like(alive, np.nan), where=share > 0)
    return float(np.rint(sizes).sum())


def _mean(values: list[Any]) -> float:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
