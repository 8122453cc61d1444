"""Paired differences between runs from their per-document sums: hierarchical bootstrap over seeds, then documents. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from decomp_bench.bootstrap import SEED, evaluate_sums, read_context, resampled
from decomp_bench.errors import UserError
from decomp_bench.metrics import CATALOGUE, UNINTERVALLED

CONDITION = ("protocol", "gates", "mask", "delta")
SAME = ("target_hash", "token_hash", "split")
Condition = tuple[str, ...]


def compare(first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame], bootstrap: int = 2000) -> pd.DataFrame:
    """Differences second - first of every metric that both sides have, under every condition that they share.

    Each side is the documents.parquet of one run, or of one configuration's runs with several seeds, whose mean counts. A resample draws
    documents, the same for every run, and where a side has several seeds those too. Columns: the condition, metric, first, second,
    difference, lo and hi (95%), p (two-sided, from the resamples; no smaller than 2 / (resamples + 1)), p_holm (corrected over the
    conditions of a metric), seeds of either side, documents. Raises UserError where the runs were not measured on the same tokens.
    """
    _check([*first, *second])
    sides = [[_conditions(frame) for frame in side] for side in (first, second)]
    shared = [key for key in sides[0][0] if all(key in found for side in sides for found in side)]
    if not shared:
        raise UserError("the runs share no condition (protocol and gates): evaluate both with the same eval config")
    rows = []
    for key in shared:
        frames = [[found[key] for found in side] for side in sides]
        rows += [dict(zip(CONDITION, key, strict=True)) | row for row in _differences(frames[0], frames[1], bootstrap)]
    made = pd.DataFrame(rows)
    made.insert(made.columns.get_loc("p") + 1, "p_holm", made.groupby("metric")["p"].transform(lambda p: holm(p.to_numpy())))  # type: ignore[operator]
    return made


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction of the p values of a family; NaN stays NaN and does not count.

    Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    corrected, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    scaled = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected


def _check(frames: Sequence[pd.DataFrame]) -> None:
    for key in SAME:
        found = sorted({str(value) for frame in frames for value in frame[key].unique()})
        if len(found) > 1:
            raise UserError(f"the runs differ in {key} ({' and '.join(found)}): evaluate them on the same target and tokens")


def _conditions(data: pd.DataFrame) -> dict[Condition, pd.DataFrame]:
    """Trained condition -> its documents; for a run without training, the first of its sweep."""
    groups = data[data["curve"] == "trained"].groupby(list(CONDITION))
    return {tuple(key): group.drop_duplicates("doc").set_index("doc") for key, group in groups}  # type: ignore[arg-type, misc]


def _differences(first: list[pd.DataFrame], second: list[pd.DataFrame], bootstrap: int) -> list[dict[str, Any]]:
    documents = first[0].index
    for frame in [*first[1:], *second]:
        documents = documents.intersection(frame.index)
    weights = resampled(len(documents), bootstrap)
    sides = [[_values(frame.loc[documents], weights) for frame in side] for side in (first, second)]
    metrics = [key for key in CATALOGUE if all(key in values for side in sides for values in side)]
    picked = _seeds(len(first), len(second), bootstrap)
    rows = []
    for metric in metrics:
        means = [_over_seeds([values[metric] for values in side], draws) for side, draws in zip(sides, picked, strict=True)]
        difference = means[1] - means[0]
        lo, hi = np.nanquantile(difference[1:], [0.025, 0.975])
        rows.append(
            {"metric": metric, "first": means[0][0], "second": means[1][0], "difference": difference[0], "lo": lo, "hi": hi,
             "p": _p_value(difference[1:]), "seeds": f"{len(first)}, {len(second)}", "documents": len(documents)}
        )  # fmt: skip
    return rows


def _seeds(first: int, second: int, bootstrap: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed of a side counts: all once, then in each resample as drawn, for either side by itself."""
    made = []
    for side, count in enumerate((first, second)):
        draws = np.random.default_rng([SEED, side]).multinomial(count, np.full(count, 1 / count), size=bootstrap)
        made.append(np.concatenate([np.ones((1, count)), draws]))
    return made[0], made[1]


def _over_seeds(values: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Mean over the seeds as drawn: values of each seed [1 + resamples], counts [1 + resamples, seeds]."""
    return (np.stack(values, 1) * counts).sum(1) / counts.sum(1)


def _p_value(differences: np.ndarray) -> float:
    """Two-sided p value of a difference of zero, from resampled differences; 1 where all are zero, NaN where any is not a number."""
    if np.isnan(differences).any():
        return float("nan")
    side = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(differences) + 1))


def _values(frame: pd.DataFrame, weights: np.ndarray) -> Mapping[str, np.ndarray]:
    ctx = read_context(frame["context"].iloc[0])
    names = [name for name in frame.columns if "@" in name and frame[name].notna().all()]
    sums: Any = {tuple(name.rsplit("@", 1)): weights @ frame[name].to_numpy() for name in names}
    found = {key: evaluate_sums(m, sums, ctx) for key, m in CATALOGUE.items() if key not in UNINTERVALLED and m.task in ("both", ctx.task)}
    return {key: values["all", "all"] for key, values in found.items() if ("all", "all") in values}
