"""How well the outputs of the replaced MLPs match: always against the clean output, sums over the whole evaluation set."""

from __future__ import annotations

from decomp_bench.metrics.base import Context, Metric, Sums, Values, per_part, ratio


def _fvu(sums: Sums, _context: Context) -> Values:
    return per_part(sums, lambda layer: ratio(sums["error", layer], sums["variance", layer]), "error")


def _norm_mse(sums: Sums, _context: Context) -> Values:
    return per_part(sums, lambda layer: ratio(sums["error", layer], sums["power", layer]), "error")


def _trimmed(sums: Sums, _context: Context) -> Values:
    return per_part(sums, lambda layer: ratio(sums["error_trimmed", layer], sums["variance_trimmed", layer]), "error_trimmed")


METRICS = [
    Metric(
        "fvu",
        "Fraction of variance unexplained",
        "",
        "lower",
        "sum_t |y_t - yhat_t|^2 / sum_t |y_t - ybar|^2, ybar the mean of the training split; `all`: mean over layers",
        "Gao et al. 2024 (arXiv 2406.04093), centred, one ratio of sums",
        _fvu,
        control="predicting the mean gives 1",
    ),
    Metric(
        "norm_mse",
        "Normalised squared error",
        "",
        "lower",
        "sum_t |y_t - yhat_t|^2 / sum_t |y_t|^2; `all`: mean over layers",
        "Gao et al. 2024 (arXiv 2406.04093), uncentred",
        _norm_mse,
        control="predicting zero gives 1",
    ),
    Metric(
        "fvu_trimmed",
        "FVU without the largest outputs",
        "",
        "lower",
        "as fvu, without tokens whose |y| is above the training split's 99.9% quantile",
        "METRICS 1.1: massive-norm tokens",
        _trimmed,
        control="equals fvu where no token dominates",
    ),
]
