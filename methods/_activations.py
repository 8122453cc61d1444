"""Activation functions of sparse coders, one small class each: which components of a row are let through, and how that is trained.

All work on pre-activations [..., features]. `strength` is what a selected component contributes, `gate` decides in evaluation which
are selected, each row for itself. In training, `support` names the entries to
compute and `value` gives their gated strengths with the gradient that training uses. A new activation is one more class here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from decomp_bench.decomposer import Choice

from ._sparse import Support, decode_at, support_of, top_of_batch, top_of_rows

if TYPE_CHECKING:
    from ._coder import DictionaryConfig


DENSE_ABOVE = 0.2
"""Share of active entries above which dense products are faster."""


@dataclass
class Code:
    """A training step's codes of one site: pre-activations and gated strengths, dense [rows, n] or at a support's entries."""

    pre: Tensor
    value: Tensor
    support: Support | None

    @property
    def rows(self) -> int:
        return len(self.value) if self.support is None else self.support.rows

    def decode(self, weight: Float[Tensor, "n d"]) -> Float[Tensor, "rows d"]:
        """codes @ weight."""
        return self.value @ weight if self.support is None else decode_at(self.value, weight, self.support)

    def fired(self) -> Float[Tensor, " n"]:
        """How often each component was active."""
        value = self.value.detach()
        return (value > 0).to(value.dtype).sum(0) if self.support is None else self.support.counts(value)


class Activation(nn.Module):
    """Base: every positive component is let through (ReLU)."""

    sweeps: ClassVar[tuple[str, ...]] = ("threshold",)
    """Which inference-time choices it has."""
    thresholds: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 2.0)
    """Minimum strengths of the default inference-time sweep; strengths are in units of the normalised pre-activation, about one."""

    def __init__(self, config: DictionaryConfig, features: int) -> None:
        super().__init__()
        self.config, self.features = config, features

    @staticmethod
    def variant(config: DictionaryConfig) -> str:
        """The config value that sets the sparsity."""
        return f"k={config.k}"

    def choices(self) -> list[Choice]:
        """The default inference-time sweep."""
        return [Choice(threshold=t) for t in self.thresholds]

    def strength(self, pre: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """What each component contributes where it is let through."""
        return pre.relu()

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        """Ones where a component is let through in evaluation; rows do not depend on each other."""
        return (pre > max(choice.threshold or 0.0, 0.0)).to(pre.dtype)

    def training_gate(self, pre: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """Ones where a component is let through in training."""
        return self.gate(pre, Choice())

    def support(self, pre: Float[Tensor, "rows n"]) -> Support | None:
        """The entries that training computes; None: all of them. Every entry with a value or a gradient is among them."""
        return _worthwhile(pre > 0)

    def value(self, pre: Float[Tensor, "*shape"], col: Int[Tensor, " active"] | None = None) -> Float[Tensor, "*shape"]:
        """Gated strengths with the gradient that training uses, of all entries [rows, n] or, with `col`, at a support's entries."""
        return pre.relu()

    def penalty(self, code: Code, decoder: Float[Tensor, "n d"]) -> Tensor | None:
        """Sparsity penalty, averaged over rows, before its warm-up."""
        return None

    def observe(self, values: Float[Tensor, "*shape"]) -> None:
        """Look at the selected strengths of a training step."""

    def calibrate(self, counts: StrengthCounts) -> None:
        """Set thresholds from strengths counted on training data, at the end of training."""


class ReLU(Activation):
    """ReLU with an L1 penalty on strengths, each weighted by the length of its write vector (Bricken et al. 2023; Conerly et al. 2024)."""

    @staticmethod
    def variant(config: DictionaryConfig) -> str:
        return f"l1={config.l1:g}"

    def penalty(self, code: Code, decoder: Float[Tensor, "n d"]) -> Tensor:
        lengths = decoder.norm(dim=1)
        weighted = code.value @ lengths if code.support is None else code.value * lengths.index_select(0, code.support.col)
        return self.config.l1 * weighted.sum() / code.rows


class JumpReLU(Activation):
    """A threshold for each component, learned through rectangle-kernel pseudo-gradients, with an L0 penalty (Rajamanoharan et al. 2024)."""

    thresholds = (1.0, 1.5, 2.0, 3.0)

    def __init__(self, config: DictionaryConfig, features: int) -> None:
        super().__init__(config, features)
        self.log_threshold = nn.Parameter(torch.full((features,), math.log(config.threshold_init)))

    @staticmethod
    def variant(config: DictionaryConfig) -> str:
        return f"l0={config.l0:g}"

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        return (pre > self.log_threshold.exp().clamp(min=choice.threshold or 0.0)).to(pre.dtype)

    def support(self, pre: Float[Tensor, "rows n"]) -> Support | None:
        return _worthwhile(pre > self.log_threshold.exp() - self.config.bandwidth / 2)

    def value(self, pre: Float[Tensor, "*shape"], col: Int[Tensor, " active"] | None = None) -> Float[Tensor, "*shape"]:
        return _Jump.apply(pre, self._log_threshold(pre, col), self.config.bandwidth)  # type: ignore[return-value]

    def penalty(self, code: Code, decoder: Float[Tensor, "n d"]) -> Tensor:
        log_threshold = self._log_threshold(code.pre, None if code.support is None else code.support.col)
        return self.config.l0 * _Step.apply(code.pre, log_threshold, self.config.bandwidth).sum() / code.rows  # type: ignore[union-attr]

    def _log_threshold(self, pre: Tensor, col: Tensor | None) -> Tensor:
        return self.log_threshold.expand_as(pre) if col is None else self.log_threshold.index_select(0, col)


class _Jump(torch.autograd.Function):
    """z where z > theta, else 0. d/dtheta = -theta/w where |z - theta| < w/2; the chain rule to log theta adds a factor theta."""

    @staticmethod
    def forward(ctx, pre, log_threshold, width):
        threshold = log_threshold.exp()
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        d_log_threshold = torch.where(near, grad, 0.0) * threshold.square() * (-1 / ctx.width)
        return torch.where(pre > threshold, grad, 0.0), d_log_threshold, None


class _Step(torch.autograd.Function):
    """1 where z > theta, else 0. d/dtheta = -1/w where |z - theta| < w/2, and none with respect to z."""

    @staticmethod
    def forward(ctx, pre, log_threshold, width):
        threshold = log_threshold.exp()
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return None, torch.where(near, grad, 0.0) * threshold * (-1 / ctx.width), None


def _worthwhile(mask: Bool[Tensor, "rows n"]) -> Support | None:
    """The support of a mask where it is sparse enough to gain from it; elsewhere than on the CPU, finding out would be a wait."""
    if mask.device.type != "cpu" or int(mask.sum()) > DENSE_ABOVE * mask.numel():
        return None
    return support_of(mask)


class TopK(Activation):
    """The k largest positive components of each row (Gao et al. 2024)."""

    sweeps = ("k",)

    def choices(self) -> list[Choice]:
        k = self.config.k
        return [Choice(k=value) for value in sorted({max(1, k // 2), 2 * k, 4 * k, 8 * k}) if value <= self.features and value != k]

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        return top_of_rows(pre, choice.k or self.config.k).to(pre.dtype)

    def support(self, pre: Float[Tensor, "rows n"]) -> Support:
        return support_of(top_of_rows(pre, self.config.k))

    def training_gate(self, pre: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        return self.support(pre.detach().reshape(-1, self.features)).gate().view(pre.shape).to(pre.dtype) * (pre > 0)


class BatchTopK(TopK):
    """In training the k * rows largest of a batch; in evaluation a threshold at which k are active on average (Bussmann et al. 2024).

    `table_threshold` holds the threshold for each count in `table_k`. It is counted on training activations in `finish`; before
    that, all of it is a moving average of the batches' own thresholds.
    """

    def __init__(self, config: DictionaryConfig, features: int) -> None:
        super().__init__(config, features)
        steps = [2 ** (i / 4) for i in range(4 * math.ceil(math.log2(features)) + 1)]
        exact = [config.k, *(choice.k for choice in self.choices() if choice.k)]
        table = torch.tensor(sorted({*exact, *(s for s in steps if s < features), features}))
        self.register_buffer("table_k", table.float())
        self.register_buffer("table_threshold", torch.zeros(len(table)))
        self._hint = 0.0

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

    def support(self, pre: Float[Tensor, "rows n"]) -> Support:
        return top_of_batch(pre, self.config.k * len(pre), self._hint)

    @torch.no_grad()
    def observe(self, values: Float[Tensor, "*shape"]) -> None:
        if not len(values):
            return
        smallest = values.min()
        if values.device.type == "cpu":
            self._hint = 0.9 * float(smallest)
        moved = torch.lerp(self.table_threshold, smallest.expand_as(self.table_threshold), 0.1)
        self.table_threshold.copy_(torch.where(self.table_threshold > 0, moved, smallest))

    @torch.no_grad()
    def calibrate(self, counts: StrengthCounts) -> None:
        self.table_threshold.copy_(counts.thresholds(self.table_k))


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


ACTIVATIONS: dict[str, type[Activation]] = {"relu": ReLU, "topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU}
