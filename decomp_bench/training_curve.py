"""Compute recovered: how far the target's own training had come when it was as good as a replaced model is. Imports no torch.

A rise of cross-entropy says little by itself: near the end of a training a tenth of a nat is most of the compute. Here the replaced model's
cross-entropy is placed on the curve that the target's training left beside its weights (Bushnaq et al. 2026; for SAEs Gao et al. 2024).
The curve is of the validation split, results of another: what is placed is the rise over the clean model, added to the curve's end. The
curve is that of one training to its end, learning rate and all, not of the best training of each length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from decomp_bench.errors import UserError
from decomp_bench.targets import NAMED

METRIC = "compute_recovered"
FILE, COLUMNS = "training_curve.csv", ["tokens", "validation_ce"]
WITHOUT = "the target has no training_curve.csv beside its weights"


def curve_of(target: str) -> pd.DataFrame | None:
    """Tokens seen and validation cross-entropy (nats per token) along the training of a target, by URI; None where nothing was kept.

    Raises UserError for a broken file.
    """
    scheme, _, rest = target.partition(":")
    folder = NAMED[target].path() if target in NAMED else Path(rest) if scheme in ("hf", "tl") and rest else None
    if folder is None or not (folder / FILE).is_file():
        return None
    try:
        found = pd.read_csv(folder / FILE)[COLUMNS].astype(float)
    except (KeyError, ValueError, UnicodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / FILE} is no training curve ({reason}): restore it, or train the target again") from None
    if len(found) < 2 or not np.isfinite(found.to_numpy()).all() or not found["tokens"].is_monotonic_increasing:
        raise UserError(f"{folder / FILE} is no training curve (two points at least, in order): restore it, or train the target again")
    return found


def recovered(curve: pd.DataFrame, rise: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Share of the training's tokens at which the target last had its final cross-entropy plus a rise (nats per token), or more.

    1 where there is no rise, 0 from the first cross-entropy of the curve on; linear between its points, NaN for NaN.
    """
    ce, tokens = curve["validation_ce"].to_numpy(), curve["tokens"].to_numpy()
    last = np.maximum.accumulate(ce[::-1])  # from the end back: the curve without its ups
    values, first = np.unique(last, return_index=True)
    share = tokens[::-1][first] / tokens[-1]
    wanted = ce[-1] + np.asarray(rise, float)
    return np.where(wanted >= values[-1], 0.0, np.interp(wanted, values, share))


def compute_recovered(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows `compute_recovered` (a share of 1) in the columns of the results, one for each row `ce_delta` and with its interval."""
    rows = frame[frame["metric"] == "ce_delta"].copy()
    rows["metric"], rows["metric_version"] = METRIC, 1
    for target, own in rows.groupby("target"):
        curve = curve_of(str(target))
        if curve is None:
            rows.loc[own.index, ["value", "lo", "hi"]] = np.nan
            rows.loc[own.index, ["applicable", "reason"]] = ["no", WITHOUT]
            continue
        for name, source in (("value", "value"), ("lo", "hi"), ("hi", "lo")):  # more cross-entropy is less compute
            rows.loc[own.index, name] = recovered(curve, own[source].to_numpy(float))
    return rows.reset_index(drop=True)
