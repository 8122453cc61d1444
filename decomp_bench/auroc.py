"""Area under the ROC curve with ties counted as half, for many scores and many labels at once (Mann and Whitney 1947)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

COLUMNS_AT_ONCE = 1 << 25
"""Entries that are ranked together."""


def auroc(values: Float[Tensor, "rows n"], labels: Bool[Tensor, "rows c"]) -> Float[Tensor, "n c"]:
    """P(value of a positive > value of a negative) + P(equal) / 2, for each column of values and each label; NaN where a class is empty.

    Where most values are zero, zeros are not sorted: they are one tie between the negative and the positive values.
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
    by_column = values.T.contiguous()
    there = by_column != 0
    count = there.sum(1)
    if 2 * int(count.max()) > len(values):
        value, order = by_column.sort(1)
        return torch.empty_like(value, dtype=torch.float64).scatter_(1, order, _tied_places(value)) @ labels.double()
    zeros, negative = len(values) - count, (by_column < 0).sum(1)
    ranks = (negative + (zeros + 1) / 2).double()[:, None].repeat(1, len(values))
    column, row = there.nonzero(as_tuple=True)
    if len(column):
        place = torch.arange(len(column), device=values.device) - (count.cumsum(0) - count)[column]
        packed = by_column.new_full((len(count), int(count.max())), torch.inf)
        packed[column, place] = by_column[column, row]
        value, order = packed.sort(1)
        rank = _tied_places(value) + (value > 0) * zeros[:, None]
        ranks[column, row] = torch.empty_like(rank).scatter_(1, order, rank)[column, place]
    return ranks @ labels.double()


def _tied_places(value: Float[Tensor, "n most"]) -> Float[Tensor, "n most"]:
    """Places 1, 2, ... of the entries of sorted rows; equal ones share the mean of theirs."""
    place = torch.arange(1, value.shape[1] + 1, device=value.device).expand(value.shape)
    change = value[:, 1:] != value[:, :-1]
    edge = torch.ones_like(value[:, :1], dtype=torch.bool)
    first = torch.where(torch.cat([edge, change], 1), place, 0).cummax(1).values
    last = torch.where(torch.cat([change, edge], 1), place, value.shape[1]).flip(1).cummin(1).values.flip(1)
    return (first + last).double() / 2
