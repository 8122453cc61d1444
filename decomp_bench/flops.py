"""Floating-point operations of a training step, those of products at active entries included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _bag(table: Sequence[int], index: Sequence[int], *_: Any, **__: Any) -> int:
    """A weighted sum of rows: two operations for each number that is read."""
    return 2 * prod(index) * table[-1]


def _sampled(support: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Entries of a product: two operations for each number of either vector."""
    return 2 * support.values().numel() * a.shape[-1]


_sampled._get_raw = True  # type: ignore[attr-defined] - the shape of a sparse tensor does not say how many entries it has

SPARSE: dict[Any, Callable[..., int]] = {
    aten._embedding_bag: _bag,
    aten._embedding_bag_forward_only: _bag,
    aten.sparse_sampled_addmm: _sampled,
}
"""What torch's counter leaves out, at least for tensors that are not dense throughout."""


def counted(work: Callable[[], object]) -> float:
    """FLOPs of the products that `work` computes, forward and backward: a multiplication and an addition are two."""
    with FlopCounterMode(display=False, custom_mapping=SPARSE) as counter:
        work()
    return float(counter.get_total_flops())
