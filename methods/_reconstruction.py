"""Masked passes in training: which positions count, masked codes for them, and how far the masked model's output is from the target's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decomp_bench.decomposer import Batch, Codes, Decomposer, Point, SiteCodes
from decomp_bench.replacement import clean_rows

from ._components import RoutedCodes
from ._masks import Uniforms, interpolate

if TYPE_CHECKING:
    from decomp_bench.targets import TargetModel


def gathers(device: torch.device) -> bool:
    """Whether positions are chosen by index, which saves work; elsewhere than on a CPU it would wait for the device."""
    return device.type == "cpu"


@dataclass
class Rows:
    """The positions that are trained on: their indices among the replaced ones (None: all), and the weights of their mean.

    `place` are their indices among all positions, those that are never replaced included; None: all positions, whose weights
    `place_weight` then are, 0 where a position does not count. `even` is False for a toy's rows that stand for different numbers of them.
    """

    index: Tensor | None
    weight: Float[Tensor, " rows"]
    count: float | Tensor
    place: Tensor | None = None
    place_weight: Float[Tensor, " places"] | None = None
    even: bool = True

    def of(self, value: Float[Tensor, "*rows d"]) -> Float[Tensor, "rows d"]:
        """The rows of a value at all replaced positions."""
        value = value.reshape(-1, value.shape[-1])
        return value if self.index is None else value.index_select(0, self.index)


def rows_of(batch: Batch, target: TargetModel) -> Rows:
    """The real positions of a batch that the target's decomposition replaces."""
    assert batch.x is not None
    device, first, rows = batch.x.device, int(target.keeps_first), batch.x.shape[0]
    if batch.length is None:
        return Rows(None, torch.full((rows,), 1 / rows, device=device), float(rows))
    real = torch.arange(batch.x.shape[1], device=device) < batch.length[:, None]
    real[:, :first] = False
    replaced, count = real[:, first:].flatten(), real.sum()
    if not gathers(device) or bool(replaced.all()):
        return Rows(None, replaced / count, count.float(), None, real.flatten() / count)
    index, place = replaced.nonzero().squeeze(1), real.flatten().nonzero().squeeze(1)
    weight = torch.full((len(index),), 1 / len(index))
    return Rows(index, weight, count.float(), place, weight)


def distinct_rows(batch: Batch, points: set[Point]) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"]] | None:
    """Indices and weights of a toy's rows where all on which nothing is read at these points are one; None where fewer than two are,
    and where choosing them would wait for the device."""
    if not gathers(batch.clean[next(iter(points))].device):
        return None
    silent = torch.stack([(batch.clean[point] == 0).all(1) for point in points]).all(0)
    if int(silent.sum()) < 2:
        return None
    kept = torch.cat([(~silent).nonzero().flatten(), silent.nonzero()[0]])
    weight = torch.full((len(kept),), 1 / len(silent), device=kept.device)
    weight[-1] = silent.float().mean()
    return kept, weight


def collapsed(batch: Batch, target: TargetModel, points: set[Point]) -> tuple[Batch, Rows]:
    """A toy's batch with all rows on which nothing is read at these points taken together as one, weighted by their number.

    Exact: no mask has an effect on them. A batch of a language model, or with fewer than two such rows, stays whole.
    """
    rows = rows_of(batch, target)
    assert batch.x is not None
    assert batch.logits is not None
    found = None if target.is_lm else distinct_rows(batch, points)
    if found is None:
        return batch, rows
    kept, weight = found
    clean = {point: value[kept] for point, value in batch.clean.items()}
    fewer = Batch(batch.x[kept], None, None if batch.doc is None else batch.doc[kept], clean, batch.logits[kept])
    return fewer, Rows(None, weight, rows.count, even=False)


def masked(lower: Float[Tensor, "rows C"], rows: Rows, chosen: Bool[Tensor, " rows"] | None, uniforms: Uniforms, delta: bool) -> SiteCodes:
    """Codes of one site with stochastic masks at the chosen rows (None: all), and the target's own map at every other position.

    Their strength is a stand-in, which `encode` replaces by that of the masked pass.
    """
    device, local = lower.device, _local(lower, rows, chosen)
    lower = lower if local is None or chosen is None else lower.index_select(0, local)
    mask = interpolate(lower, uniforms.draw(*lower.shape, device=device))
    remainder = uniforms.draw(len(lower), device=device) if delta else None
    return _codes(mask, remainder, rows, chosen, local)


def placed(mask: Float[Tensor, "rows C"], remainder: Float[Tensor, " rows"] | None, rows: Rows, chosen: Bool[Tensor, " rows"] | None = None
           ) -> SiteCodes:
    """Codes of one site with given masks at the chosen rows, and elsewhere as in `masked`; `remainder` None: off at the chosen rows."""
    local = _local(mask, rows, chosen)
    if local is not None and chosen is not None:
        mask, remainder = mask.index_select(0, local), None if remainder is None else remainder.index_select(0, local)
    return _codes(mask, remainder, rows, chosen, local)


def _local(value: Tensor, rows: Rows, chosen: Tensor | None) -> Tensor | None:
    """Which rows are chosen, by index; None where masks are made for all."""
    if not gathers(value.device) or (chosen is None and rows.index is None):
        return None
    return torch.arange(len(value)) if chosen is None else chosen.nonzero().squeeze(1)


def _codes(mask: Tensor, remainder: Tensor | None, rows: Rows, chosen: Tensor | None, local: Tensor | None) -> SiteCodes:
    if local is not None:
        return RoutedCodes(mask, mask, remainder, local if rows.index is None else rows.index.index_select(0, local))
    if chosen is not None:
        remainder = torch.where(chosen, 0.0 if remainder is None else remainder, 1.0)
        mask = torch.where(chosen[:, None], mask, 1.0)
    return SiteCodes(mask, mask, remainder)


def divergence(decomposer: Decomposer, batch: Batch, rows: Rows, codes: Codes | None, layers: tuple[int, ...]) -> Float[Tensor, ""]:
    """KL(target || masked) on logits, or the mean squared error of a regression, over the rows. Gates are these codes; None: its own."""
    assert batch.logits is not None
    gates = "self" if codes is None else _whole(codes, batch, decomposer.target)
    output = decomposer.replaced(batch, layers, gates=gates).logits
    if not decomposer.target.is_lm:
        return output_error(output, batch, decomposer.target) if rows.even else rows.weight @ (output - batch.logits).square().mean(1)
    return _KL.apply(output.flatten(0, 1), batch.logits.flatten(0, 1), rows.place, rows.place_weight)  # type: ignore[return-value]


def reading_error(decomposer: Decomposer, batch: Batch, rows: Rows, codes: Codes, layers: tuple[int, ...]) -> Float[Tensor, ""]:
    """Mean squared difference, over rows and entries of all masked maps together, between what they read in a masked and the clean pass."""
    read = decomposer.replaced(batch, layers, gates=_whole(codes, batch, decomposer.target)).inputs
    errors = [rows.of(read[name] - clean_rows(decomposer, batch.clean[name])).square() for name in codes]
    return torch.stack([rows.weight @ error.sum(-1) for error in errors]).sum() / sum(error.shape[-1] for error in errors)


def output_error(output: Tensor, batch: Batch, target: TargetModel) -> Float[Tensor, ""]:
    """KL(target || output) over the real positions that are replaced, or the mean squared error of a regression."""
    assert batch.logits is not None
    if not target.is_lm:
        return (output - batch.logits).square().mean()
    rows = rows_of(batch, target)
    return _KL.apply(output.flatten(0, 1), batch.logits.flatten(0, 1), rows.place, rows.place_weight)  # type: ignore[return-value]


def _whole(codes: Codes, batch: Batch, target: TargetModel) -> Codes:
    """Codes of rows as codes of a batch: a language model's are [sequences, positions, n], except where they name their rows."""
    if not target.is_lm:
        return codes
    assert batch.x is not None
    return {name: value if isinstance(value, RoutedCodes) else _unflatten(value, len(batch.x)) for name, value in codes.items()}


def _unflatten(codes: SiteCodes, sequences: int) -> SiteCodes:
    strength, gate = (value.unflatten(0, (sequences, -1)) for value in (codes.strength, codes.gate))
    return SiteCodes(strength, gate, None if codes.delta is None else codes.delta.unflatten(0, (sequences, -1)))


class _KL(torch.autograd.Function):
    """Weighted sum over some rows of KL(softmax(target) || softmax(logits)); only the logits get a gradient."""

    @staticmethod
    def forward(ctx, logits, target, index, weight):
        gradient = torch.empty_like(logits) if index is None else torch.zeros_like(logits)
        total = logits.new_zeros(())
        size = max(1, (1 << 17) // logits.shape[1]) if logits.device.type == "cpu" else len(weight)
        for start in range(0, len(weight), size):  # in pieces that stay in a core's cache
            rows, w = slice(start, start + size), weight[start : start + size]
            chosen = rows if index is None else index[rows]
            log_p, log_q = target[chosen].log_softmax(-1), logits[chosen].log_softmax(-1)
            p = log_p.exp()
            total += torch.linalg.vecdot(log_p.sub_(log_q), p) @ w
            gradient[chosen] = log_q.exp_().sub_(p).mul_(w[:, None])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        return ctx.saved_tensors[0] * g, None, None, None
