"""Passes of the target in training, in which coders compute their codes as training does, with its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decomp_bench.decomposer import Batch, SiteCodes

from ._activations import Code


def rows_that_count(batch: Batch, keeps_first: bool) -> Int[Tensor, " rows"] | None:
    """Indices of a batch's real positions among those that are replaced; None: all of them."""
    if batch.x is None or batch.length is None:
        return None
    place = torch.arange(int(keeps_first), batch.x.shape[1], device=batch.x.device)
    return (place < batch.length[:, None]).flatten().nonzero().squeeze(1)


@dataclass
class TrainingCodes(SiteCodes):
    """Codes of the rows that count alone. `strength` and `gate` stand empty: `code` holds both, as a training step needs them.

    `inputs` are the normalised rows that were encoded.
    """

    code: Code | None = None
    inputs: Float[Tensor, "rows d"] | None = None


@dataclass
class Places:
    """Which of the replaced positions [*shape] count: their indices, None for all."""

    index: Int[Tensor, " rows"] | None
    shape: tuple[int, ...] = ()

    def gather(self, value: Float[Tensor, "*places d"]) -> Float[Tensor, "rows d"]:
        """The rows that count; their arrangement is kept for `scatter`."""
        self.shape = tuple(value.shape[:-1])
        value = value.reshape(-1, value.shape[-1])
        return value if self.index is None else value.index_select(0, self.index)

    def scatter(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, "*places d"]:
        """Rows back at their positions, zeros elsewhere: no position that counts sees those."""
        if self.index is not None:
            whole = rows.new_zeros(torch.Size(self.shape).numel(), rows.shape[1])
            rows = whole.index_copy(0, self.index, rows)
        return rows.view(*self.shape, -1)
