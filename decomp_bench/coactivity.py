"""How two banks of components are active together on the same positions: correlations and overlaps, from sums over batches."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CONSTANT = 1e-6
"""Variance, relative to the mean square, below which a series is a constant and has no correlation."""


class Joint:
    """Sums of two sets of series over positions, for the Pearson correlation of each of the one with each of the other.

    Series are taken from the mean of their first batch, so that single precision is enough.
    """

    def __init__(self) -> None:
        self.count = 0
        self._start: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, a: Float[Tensor, "positions n"], b: Float[Tensor, "positions m"]) -> None:
        """Take in some positions, of which there must be one at least."""
        if self._start is None:
            self._start = a.mean(0), b.mean(0)
        a, b = a - self._start[0], b - self._start[1]
        found = [value.double() for value in (a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), a.T @ b)]
        self._sums = [old + new for old, new in zip(self._sums, found, strict=True)] if self._sums else found
        self.count += len(a)

    def correlation(self) -> Float[Tensor, "n m"]:
        """Pearson correlations; NaN with a series that is constant."""
        assert self._start is not None
        a, b, squares_a, squares_b, products = (value / self.count for value in self._sums)
        deviations = []
        for mean, square, start in ((a, squares_a, self._start[0]), (b, squares_b, self._start[1])):
            variance, whole = square - mean.square(), square + start.double().square()
            deviations.append(torch.where(variance > CONSTANT * whole, variance, torch.nan).sqrt())
        return ((products - a[:, None] * b) / (deviations[0][:, None] * deviations[1])).clamp(-1, 1)


class Overlap:
    """Counts of two sets of booleans over positions, for the Jaccard index of each of the one with each of the other."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []

    def add(self, a: Bool[Tensor, "positions n"], b: Bool[Tensor, "positions m"]) -> None:
        """Take in some positions."""
        one, other = a.float(), b.float()  # counts of a batch are exact
        found = [value.double() for value in (one.sum(0), other.sum(0), one.T @ other)]
        self._counts = [old + new for old, new in zip(self._counts, found, strict=True)] if self._counts else found

    def jaccard(self) -> Float[Tensor, "n m"]:
        """Positions where both are on over those where either is; NaN where neither ever is."""
        a, b, both = self._counts
        return both / (a[:, None] + b - both)


Series = tuple[Tensor, Tensor, Tensor]
"""Gates, sizes of gated strengths, and where components are active, each [positions, components]."""


class Together:
    """How the components of two banks are active together at the same positions and, as a null, half a batch apart."""

    def __init__(self) -> None:
        self._parts = [(Joint(), Joint(), Overlap()) for _ in range(2)]

    def add(self, first: Series, second: Series) -> None:
        """Take in a batch."""
        for part, shift in zip(self._parts, (0, len(first[0]) // 2), strict=True):
            for sums, one, other in zip(part, first, second, strict=True):
                sums.add(one, other.roll(shift, 0))

    def similarities(self) -> dict[str, tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]]:
        """Aspect (gate, activity, active) -> similarity of the components, and its null."""
        own, null = ((gate.correlation(), value.correlation(), active.jaccard()) for gate, value, active in self._parts)
        return dict(zip(("gate", "activity", "active"), zip(own, null, strict=True), strict=True))
