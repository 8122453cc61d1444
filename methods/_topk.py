"""Activations that select by rank: of a row (TopK, GroupMax) or of a whole batch (BatchTopK, Matryoshka)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decomp_bench.decomposer import Choice

from ._activations import Activation
from ._calibration import StrengthCounts
from ._dictionary_config import DictionaryConfig
from ._sparse import Support, top_of_batch, top_of_each_row, top_of_rows


class TopK(Activation):
    """The k largest positive components of each row (Gao et al. 2024)."""

    sweeps = ("k",)
    by_rows = True

    def __init__(self, config: DictionaryConfig, features: int, bias: Float[Tensor, " features"]) -> None:
        super().__init__(config, features, bias)
        self.k = config.k  # of the training step at hand, which may still be on its way to the config's

    def choices(self) -> list[Choice]:
        k = self.config.k
        return [Choice(k=value) for value in sorted({max(1, k // 2), 2 * k, 4 * k, 8 * k}) if value <= self.features and value != k]

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        return top_of_rows(pre, choice.k or self.config.k).to(pre.dtype)

    def support(self, pre: Float[Tensor, "rows n"], k: int | None = None) -> Support:
        return top_of_each_row(pre, k or self.k)

    def training_gate(self, pre: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        return self.support(pre.detach().reshape(-1, self.features)).gate().view(pre.shape).to(pre.dtype) * (pre > 0)


class BatchTopK(TopK):
    """In training the k * rows largest of a batch; in evaluation a threshold at which k are active on average (Bussmann et al. 2024).

    `table_threshold` holds the threshold for each count in `table_k`. It is counted on training activations in `finish`; before
    that, all of it is a moving average of the batches' own thresholds.
    """

    by_rows = False

    def __init__(self, config: DictionaryConfig, features: int, bias: Float[Tensor, " features"]) -> None:
        super().__init__(config, features, bias)
        steps = [2 ** (i / 4) for i in range(4 * math.ceil(math.log2(features)) + 1)]
        exact = [config.k, *(choice.k for choice in self.choices() if choice.k)]
        table = torch.tensor(sorted({*exact, *(s for s in steps if s < features), features}))
        self.register_buffer("table_k", table.float())
        self.register_buffer("table_threshold", torch.zeros(len(table)))
        self.hint = 0.0

    table_k: Tensor
    table_threshold: Tensor

    def threshold(self, k: int) -> Tensor:
        """The threshold at which k components are active on average, interpolated between the table's counts."""
        position = self.table_k.new_tensor(min(k, self.features))
        above = torch.searchsorted(self.table_k, position).clamp(1, len(self.table_k) - 1)
        low, high = self.table_k[above - 1], self.table_k[above]
        share = torch.log(position / low) / torch.log(high / low)
        return torch.lerp(self.table_threshold[above - 1], self.table_threshold[above], share)

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        return (pre > self.threshold(choice.k or self.config.k).clamp_min(0)).to(pre.dtype)

    def support(self, pre: Float[Tensor, "rows n"], k: int | None = None) -> Support:
        return top_of_batch(pre, (k or self.k) * len(pre), self.hint)

    @torch.no_grad()
    def observe(self, values: Float[Tensor, "*shape"]) -> None:
        if not len(values):
            return
        smallest = values.min()
        if values.device.type == "cpu":
            self.hint = 0.9 * float(smallest)
        moved = torch.lerp(self.table_threshold, smallest.expand_as(self.table_threshold), 0.1)
        self.table_threshold.copy_(torch.where(self.table_threshold > 0, moved, smallest))

    @torch.no_grad()
    def calibrate(self, counts: StrengthCounts) -> None:
        self.table_threshold.copy_(counts.thresholds(self.table_k))


class Matryoshka(BatchTopK):
    """BatchTopK whose first components must also reconstruct y by themselves, in nested prefixes (Bussmann et al. 2025)."""


class GroupMax(Activation):
    """The largest of each of k groups of neighbouring components, where it is positive (as in sparsify)."""

    by_rows = True

    def support(self, pre: Float[Tensor, "rows n"], k: int | None = None) -> Support:
        best = self._best(pre)
        index = (torch.arange(len(pre), device=pre.device)[:, None] * self.features + best).flatten()
        if pre.device.type == "cpu":  # elsewhere, leaving out those that are not positive would be a wait
            index = index[pre.gather(1, best).flatten() > 0]
        return Support(len(pre), self.features, index)

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        return super().gate(pre, choice) * torch.zeros_like(pre).scatter(-1, self._best(pre), 1.0)

    def _best(self, pre: Float[Tensor, "*rows n"]) -> Int[Tensor, "*rows k"]:
        """The largest component of each group."""
        size = self.features // self.config.k
        best = pre.unflatten(-1, (self.config.k, size)).argmax(-1)
        return best + torch.arange(0, self.features, size, device=pre.device)
