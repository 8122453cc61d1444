"""Kernels that touch only active components: exact selection, and encoding and decoding at a sparse set of entries.

A support is the set of active entries of a code matrix [rows, features], kept as sorted flat indices. On the CPU, selection goes
through a partition of numbers (numpy's vectorised quickselect, several times faster than sorting or torch.topk), and every product
with the codes, forward and backward, is an `embedding_bag` over active entries; no [rows, features] gradient is ever formed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

with warnings.catch_warnings():  # torch says once a process that its CSR tensors are in beta
    warnings.simplefilter("ignore")
    torch.zeros(1, 1).to_sparse_csr()


BLOCK = 1 << 17
"""Entries of a matrix that are selected from together: what stays in a core's cache takes a quarter of the time."""


@dataclass
class Support:
    """Active entries of a code matrix [rows, features]: `index` holds the sorted positions in the flattened matrix."""

    rows: int
    features: int
    index: Int[Tensor, " active"]
    row: Int[Tensor, " active"] = field(init=False)
    col: Int[Tensor, " active"] = field(init=False)

    def __post_init__(self) -> None:
        self.row = torch.div(self.index, self.features, rounding_mode="floor")
        self.col = self.index - self.row * self.features

    @cached_property
    def starts(self) -> Int[Tensor, " rows_1"]:
        """Where each row's entries begin; one more number than there are rows."""
        return torch.searchsorted(self.row, torch.arange(self.rows + 1, device=self.index.device))

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, " active"], Int[Tensor, " active"], Int[Tensor, " features_1"]]:
        """The same entries ordered by feature: the order, the rows in that order, and where each feature's entries begin."""
        if self.col.device.type == "cpu" and self.features <= 1 << 16:  # numpy sorts 16-bit keys by radix
            order = torch.from_numpy(np.argsort(self.col.numpy().astype(np.uint16), kind="stable"))
        else:
            order = torch.argsort(self.col, stable=True)
        bounds = torch.arange(self.features + 1, device=self.col.device)
        return order, self.row.index_select(0, order), torch.searchsorted(self.col.index_select(0, order), bounds)

    def counts(self, values: Float[Tensor, " active"]) -> Float[Tensor, " features"]:
        """How many entries of each feature are positive."""
        order, _, starts = self.by_feature
        return torch.segment_reduce((values > 0).to(values.dtype).index_select(0, order), "sum", offsets=starts, initial=0.0)

    def of(self, matrix: Float[Tensor, "rows features"]) -> Float[Tensor, " active"]:
        """A matrix's entries here."""
        return matrix.reshape(-1).index_select(0, self.index)

    def gate(self) -> Float[Tensor, "rows features"]:
        """The support as a dense matrix of zeros and ones."""
        flat = torch.zeros(self.rows * self.features, device=self.index.device)
        return flat.index_fill_(0, self.index, 1.0).view(self.rows, self.features)


def stacked(supports: list[Support]) -> Support:
    """The support of a matrix from those of its parts, each of some rows."""
    if len(supports) == 1:
        return supports[0]
    features, starts = supports[0].features, [0, *accumulate(support.rows for support in supports)]
    index = torch.cat([support.index + start * features for support, start in zip(supports, starts, strict=False)])
    return Support(starts[-1], features, index)


def support_of(mask: Bool[Tensor, "rows features"]) -> Support:
    """The support of a dense mask."""
    rows, features = mask.shape
    if mask.device.type == "cpu":
        return Support(rows, features, torch.from_numpy(np.flatnonzero(mask.numpy())))
    return Support(rows, features, mask.flatten().nonzero().squeeze(1))


def top_of_batch(pre: Float[Tensor, "rows features"], count: int, hint: float = 0.0) -> Support:
    """The `count` largest positive entries of the whole matrix.

    `hint`, a guess below the smallest selected entry, saves time on the CPU and never changes the result. Elsewhere the support has
    exactly `count` entries (no wait for the device), some of them perhaps not positive.
    """
    rows, features = pre.shape
    if pre.device.type != "cpu":
        return Support(rows, features, pre.flatten().topk(min(count, pre.numel()), sorted=False).indices.sort().values)
    (index,) = _largest([pre.detach().numpy().reshape(-1)], count, hint)
    return Support(rows, features, torch.from_numpy(index))


def top_of_batches(pres: list[Float[Tensor, "rows features"]], count: int, hint: float = 0.0) -> list[Support]:
    """The `count` largest positive entries of several matrices together; `hint` as in `top_of_batch`."""
    rows, features = pres[0].shape
    if pres[0].device.type == "cpu":
        found = _largest([pre.detach().numpy().reshape(-1) for pre in pres], count, hint)
        return [Support(rows, features, torch.from_numpy(index)) for index in found]
    flat = torch.cat([pre.flatten() for pre in pres])
    index = flat.topk(min(count, len(flat)), sorted=False).indices.sort().values
    bounds = torch.searchsorted(index, torch.arange(1, len(pres), device=index.device) * (rows * features)).cpu()
    return [Support(rows, features, part - place * rows * features) for place, part in enumerate(index.tensor_split(bounds))]


def _largest(flats: list[np.ndarray], count: int, hint: float) -> list[np.ndarray]:
    """For each array, the sorted positions of its entries among the `count` largest positive ones of all; ties: the first ones."""
    found = [np.flatnonzero(flat > max(hint, 0.0)) for flat in flats]
    if sum(map(len, found)) < count and hint > 0:
        found = [np.flatnonzero(flat > 0) for flat in flats]
    if (total := sum(map(len, found))) > count:
        parts = [flat[index] for flat, index in zip(flats, found, strict=True)]
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
        threshold = np.partition(values, total - count)[total - count]
        kept = values > threshold
        kept[np.flatnonzero(values == threshold)[: count - int(kept.sum())]] = True
        ends = np.cumsum([len(index) for index in found])[:-1]
        found = [index[mask] for index, mask in zip(found, np.split(kept, ends), strict=True)]
    return found


def top_of_rows(pre: Float[Tensor, "*rows features"], k: int) -> Bool[Tensor, "*rows features"]:
    """Which entries are among the k largest of their row, and positive."""
    if k >= pre.shape[-1]:
        return pre > 0
    mask = torch.zeros(pre.shape, dtype=torch.bool, device=pre.device)
    if pre.device.type == "cpu":
        mask.view(-1)[torch.from_numpy(_largest_of_rows(pre.detach().flatten(0, -2).numpy(), k))] = True
        return mask
    return mask.scatter_(-1, pre.topk(k, dim=-1, sorted=False).indices, True) & (pre > 0)


def top_of_each_row(pre: Float[Tensor, "rows features"], k: int) -> Support:
    """The support of the k largest positive entries of each row; elsewhere than on the CPU of exactly k (no wait for the device), some of
    them perhaps not positive."""
    rows, features = pre.shape
    if pre.device.type != "cpu":
        column = pre.topk(min(k, features), dim=1, sorted=False).indices.sort(dim=1).values
        return Support(rows, features, (column + torch.arange(rows, device=pre.device)[:, None] * features).flatten())
    if k >= features:
        return support_of(pre > 0)
    return Support(rows, features, torch.from_numpy(_largest_of_rows(pre.detach().numpy(), k)))


def _largest_of_rows(values: np.ndarray, k: int) -> np.ndarray:
    """Sorted flat positions of the k largest positive entries of each row; ties: the first ones."""
    rows, features = values.shape
    size = max(1, BLOCK // features)
    found = [np.empty(0, np.int64)]
    for start in range(0, rows, size):
        block = values[start : start + size]
        bound = np.maximum(_kth_or_below(block, k), np.nextafter(block.dtype.type(0), block.dtype.type(1)))
        found.append(np.flatnonzero(block >= bound) + start * features)
    return _trimmed(np.concatenate(found), values, k)


def _kth_or_below(block: np.ndarray, k: int) -> np.ndarray:
    """For each row its k-th largest entry, or in wide blocks a number a little below it: k of the maxima over parts are no smaller."""
    features = block.shape[1]
    if (parts := min(16, features // (8 * k))) > 1:
        groups = features // parts
        block = block[:, : groups * parts].reshape(-1, parts, groups).max(1)
    return np.partition(block, -k, axis=1)[:, -k, None]


def _trimmed(index: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """What is left of sorted positions when each row keeps its k largest; ties: the first ones."""
    rows, features = values.shape
    row = index // features
    counts = np.bincount(row, minlength=rows)
    if not len(index) or (widest := counts.max()) <= k:
        return index
    found = np.full((rows, widest), -np.inf, values.dtype)
    filled = np.arange(widest) < counts[:, None]
    found[filled] = values.reshape(-1)[index]
    smallest = np.partition(found, -k, axis=1)[:, -k, None]
    larger, ties = found > smallest, found == smallest
    kept = larger | (ties & (np.cumsum(ties, axis=1) <= k - larger.sum(1, keepdims=True)))
    return index[kept[filled]]


class _EncodeAt(torch.autograd.Function):
    """x W^T + b at the entries of a support, where it is already known."""

    @staticmethod
    def forward(ctx, x, weight, bias, entries, support):
        ctx.save_for_backward(x, weight)
        ctx.support = support
        return entries.view_as(entries)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        support: Support = ctx.support
        order, row, starts = support.by_feature
        ordered = grad.index_select(0, order)
        d_weight = _bag(row, x, starts, ordered) if ctx.needs_input_grad[1] else None
        d_bias = torch.segment_reduce(ordered, "sum", offsets=starts, initial=0.0) if ctx.needs_input_grad[2] else None
        d_x = _bag(support.col, weight, support.starts, grad) if ctx.needs_input_grad[0] else None
        return d_x, d_weight, d_bias, None, None


class _DecodeAt(torch.autograd.Function):
    """codes @ W where the codes are zero outside a support."""

    @staticmethod
    def forward(ctx, values, weight, support):
        ctx.save_for_backward(values, weight)
        ctx.support = support
        return _bag(support.col, weight, support.starts, values)

    @staticmethod
    def backward(ctx, grad):
        values, weight = ctx.saved_tensors
        support: Support = ctx.support
        grad = grad.contiguous()
        d_values = d_weight = None
        if ctx.needs_input_grad[0]:
            d_values = _dot_at(grad, weight, support)
        if ctx.needs_input_grad[1]:
            order, row, starts = support.by_feature
            d_weight = _bag(row, grad, starts, values.index_select(0, order))
        return d_values, d_weight, None


def encode_at(
    x: Float[Tensor, "rows d"],
    weight: Float[Tensor, "features d"],
    bias: Float[Tensor, " features"],
    entries: Float[Tensor, " active"],
    support: Support,
) -> Float[Tensor, " active"]:
    """`entries`, the values of x weight^T + bias at a support, made differentiable in x, weight and bias."""
    return _EncodeAt.apply(x, weight, bias, entries, support)  # type: ignore[return-value]


def decode_at(values: Float[Tensor, " active"], weight: Float[Tensor, "features d"], support: Support) -> Float[Tensor, "rows d"]:
    """codes @ weight for codes that are `values` at a support and zero elsewhere; differentiable in values and weight."""
    return _DecodeAt.apply(values, weight, support)  # type: ignore[return-value]


def _bag(index: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights * table[index] within each group that `starts` bounds."""
    return F.embedding_bag(index, table, starts[:-1], mode="sum", per_sample_weights=weights)


def _dot_at(a: Float[Tensor, "rows d"], b: Float[Tensor, "features d"], support: Support) -> Float[Tensor, " active"]:
    """The entries of a b^T at a support."""
    if support.index.numel() == 0:
        return a.new_zeros(0)
    if a.device.type == "cuda" or (a.device.type == "cpu" and torch.backends.mkl.is_available()):
        zeros = torch.sparse_csr_tensor(
            support.starts, support.col, a.new_zeros(support.index.numel()), (support.rows, support.features), check_invariants=False
        )
        return torch.sparse.sampled_addmm(zeros, a, b.t(), beta=0.0).values()
    return (a @ b.t()).reshape(-1).index_select(0, support.index)
