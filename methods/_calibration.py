"""Counting strengths, from which thresholds are read."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class StrengthCounts:
    """A fine histogram of positive strengths, from which the threshold for any mean number of active components is read."""

    BINS, LOW, HIGH = 1 << 16, -20.0, 12.0  # in powers of two: neighbouring edges differ by 0.03%

    def __init__(self) -> None:
        self.rows = 0
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)

    def add(self, pre: Float[Tensor, "rows n"]) -> None:
        """Count the strengths of some rows."""
        self.rows += len(pre)
        exponent = pre[pre > 2**self.LOW].log2().clamp(max=self.HIGH)
        self.counts += torch.histc(exponent.float(), self.BINS, self.LOW, self.HIGH).cpu()

    def thresholds(self, k: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """For each k, the strength that k components of a row exceed on average; 0 where fewer are ever positive."""
        above = self.counts.flip(0).cumsum(0) / max(self.rows, 1)  # mean count at or above the lower edge of bin BINS - 1 - i
        wanted = k.to("cpu", torch.float64)
        i = torch.searchsorted(above, wanted).clamp(max=self.BINS - 1)
        below = torch.where(i > 0, above[(i - 1).clamp(min=0)], 0.0)
        share = ((wanted - below) / (above[i] - below).clamp(min=1e-12)).clamp(0, 1)
        exponent = self.HIGH - (i + share) * (self.HIGH - self.LOW) / self.BINS
        return torch.where(wanted > above[-1], 0.0, torch.exp2(exponent)).to(k)
