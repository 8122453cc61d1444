"""Area under the ROC curve with ties counted as half, for many scores and many labels at once (Mann and Whitney 1947)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

COLUMNS_AT_ONCE = 1 << 25
"""Entries that are ranked together."""


def auroc(values: Float[Tensor, "rows n"], labels: Bool[Tensor, "rows c"]) -> Float[Tensor, "n c"]:
    """P(value of a positive > value of a negative) + P(equal) / 2, for each column of values and each label; NaN where a class is empty.

    Zeros are never sorted: they are one tie between the negative and the positive values, so sparse codes cost what is not zero.
    """
    rows, n = values.shape
    positives = labels.double().sum(0)
    found = torch.empty(n, labels.shape[1], dtype=torch.float64, device=values.device)
    for part in torch.arange(n, device=values.device).split(max(1, COLUMNS_AT_ONCE // max(1, rows))):
        found[part] = _rank_sums(values[:, part], labels)
    u = found - positives * (positives + 1) / 2
    return u / (positives * (rows - positives)).where((positives > 0) & (positives < rows), torch.nan)


def _rank_sums(values: Float[Tensor, "rows n"], labels: Bool[Tensor, "rows c"]) -> Float[Tensor, "n c"]:
    """Sum of the tie-averaged ranks of the positives."""
    n = values.shape[1]
    column, row = values.T.nonzero(as_tuple=True)
    value = values[row, column]
    order = value.argsort(stable=True)
    order = order[column[order].argsort(stable=True)]
    column, row, value = column[order], row[order], value[order]
    negative = torch.bincount(column[value < 0], minlength=n).double()
    count = torch.bincount(column, minlength=n).double()
    zeros = len(values) - count
    rank = _tied_places(column, value) - (count.cumsum(0) - count)[column] + (value > 0) * zeros[column]
    of_zero = negative + (zeros + 1) / 2
    sums = []
    for label in labels.T:
        hit = label[row]
        ranked = torch.bincount(column, weights=rank * hit, minlength=n)
        sums.append(ranked + of_zero * (label.sum() - torch.bincount(column[hit], minlength=n)))
    return torch.stack(sums, 1)


def _tied_places(column: Tensor, value: Tensor) -> Float[Tensor, " entries"]:
    """Places 1, 2, ... of entries sorted by column and value; equal ones share the mean of theirs."""
    if not len(value):
        return value.double()
    new = torch.ones(len(value), dtype=torch.bool, device=value.device)
    new[1:] = (value[1:] != value[:-1]) | (column[1:] != column[:-1])
    run = new.cumsum(0) - 1
    length = torch.bincount(run).double()
    end = length.cumsum(0)
    return (end - (length - 1) / 2)[run]
