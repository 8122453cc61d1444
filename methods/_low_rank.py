"""A coder whose decoders to later layers are products of low rank."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._coder import SparseCoder
from ._dictionary_config import DictionaryConfig


class LowRankCoder(SparseCoder):
    """The first place has a decoder W_dec [n, d] of its own, each later one A B, with A [n, rank] and B [rank, d].

    All rows start as random directions over all places together, as with whole decoders.
    """

    def __init__(
        self, config: DictionaryConfig, width: int, outs: list[int], rank: int, generator: torch.Generator, skip: int | None
    ) -> None:
        super().__init__(config, width, sum(outs), False, generator, skip)
        own, *later = self.W_dec.data.split(outs, 1)
        self.W_dec = nn.Parameter(own.clone())
        bases = [torch.linalg.qr(torch.randn(part.shape[1], rank, generator=generator)).Q.T for part in later]
        self.B = nn.ParameterList([nn.Parameter(base) for base in bases])
        self.A = nn.ParameterList([nn.Parameter(part @ base.T) for part, base in zip(later, bases, strict=True)])
        self.to_unit_rows()

    @property
    def rows(self) -> Float[Tensor, "n out"]:
        return torch.cat([self.W_dec, *(A @ B for A, B in zip(self.A, self.B, strict=True))], 1)

    @torch.no_grad()
    def to_unit_rows(self) -> None:
        lengths = self.lengths[:, None]
        for part in (self.W_dec, *self.A):
            part.div_(lengths)

    def write_along(self, ids: Int[Tensor, " some"], y: Float[Tensor, "some out"]) -> list[nn.Parameter]:
        own, *later = y.split([self.W_dec.shape[1], *(B.shape[1] for B in self.B)], 1)
        self.W_dec[ids] = own
        for A, B, part in zip(self.A, self.B, later, strict=True):
            A[ids] = torch.linalg.lstsq(B.T, part.T).solution.T  # the nearest that the basis can write
        lengths = self.lengths[ids, None]
        for part in (self.W_dec, *self.A):
            part[ids] = part[ids] / lengths
        return [self.W_dec, *self.A]
