"""What every activation function of a sparse coder has: which components of a row are let through, and how that is trained.

All work on pre-activations [..., features]. `strength` is what a selected component contributes, `gate` decides in evaluation which
are selected, each row for itself. In training, `support` names the entries to compute and `value` gives their gated strengths with
the gradient that training uses. An activation is one small class: ReLU is here, the others are in files beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from decomp_bench.decomposer import Choice

from ._sparse import Support, decode_at, support_of

if TYPE_CHECKING:
    from ._calibration import StrengthCounts
    from ._dictionary_config import DictionaryConfig

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

    @property
    def features(self) -> int:
        """How many components there are."""
        return self.value.shape[1] if self.support is None else self.support.features

    def decode(self, weight: Float[Tensor, "n d"]) -> Float[Tensor, "rows d"]:
        """codes @ weight."""
        return self.value @ weight if self.support is None else decode_at(self.value, weight, self.support)

    def fired(self) -> Float[Tensor, " n"]:
        """How often each component was active."""
        value = self.value.detach()
        return (value > 0).to(value.dtype).sum(0) if self.support is None else self.support.counts(value)

    def of_rows(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, " rows"]:
        """Sums over each row of numbers that are laid out as `value` is."""
        if self.support is None:
            return value.sum(1)
        return value.new_zeros(self.rows).index_add(0, self.support.row, value)

    def between(self, start: int, stop: int) -> Code:
        """The codes of components start to stop - 1 alone; elsewhere than on the CPU those at a support keep their places among all."""
        if self.support is None:
            return Code(self.pre[:, start:stop], self.value[:, start:stop], None)
        if self.value.device.type != "cpu":  # leaving out the others would be a wait
            inside = (self.support.col >= start) & (self.support.col < stop)
            return replace(self, value=torch.where(inside, self.value, 0.0))
        kept = ((self.support.col >= start) & (self.support.col < stop)).nonzero().squeeze(1)
        row, col = self.support.row.index_select(0, kept), self.support.col.index_select(0, kept)
        support = Support(self.support.rows, stop - start, row * (stop - start) + col - start)
        return Code(self.pre.index_select(0, kept), self.value.index_select(0, kept), support)


class Activation(nn.Module):
    """Base: every positive component is let through (ReLU)."""

    sweeps: ClassVar[tuple[str, ...]] = ("threshold",)
    """Which inference-time choices it has."""
    by_rows: ClassVar[bool] = False
    """Whether `support` always names entries, and those of a row by that row alone."""
    thresholds: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 2.0)
    """Minimum strengths of the default inference-time sweep; strengths are in units of the normalised pre-activation, about one."""

    def __init__(self, config: DictionaryConfig, features: int, bias: Float[Tensor, " features"]) -> None:
        """`bias` is the coder's: pre-activations hold it."""
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

    def support(self, pre: Float[Tensor, "rows n"], k: int | None = None) -> Support | None:
        """The entries that training computes; None: all of them. Every entry with a value or a gradient is among them.

        `k` stands for the config's where the activation selects a number of components.
        """
        return worthwhile(pre > 0)

    def value(self, pre: Float[Tensor, "*shape"], col: Int[Tensor, " active"] | None = None) -> Float[Tensor, "*shape"]:
        """Gated strengths with the gradient that training uses, of all entries [rows, n] or, with `col`, at a support's entries."""
        return pre.relu()

    def penalty(self, code: Code, decoder: Float[Tensor, "n d"]) -> Tensor | None:
        """Sparsity penalty, averaged over rows, before its warm-up."""
        return None

    def open(self, code: Code) -> Code | None:
        """Codes whose reconstruction through the frozen decoder is trained besides, or None."""
        return None

    def observe(self, values: Float[Tensor, "*shape"]) -> None:
        """Look at the selected strengths of a training step."""

    def calibrate(self, counts: StrengthCounts) -> None:
        """Set thresholds from strengths counted on training data, at the end of training."""

    def restart(self, ids: Int[Tensor, " dead"]) -> list[nn.Parameter]:
        """Put own parameters of some components back to their start; returns those parameters."""
        return []

    def folded(self, shift: Float[Tensor, " n"]) -> dict[str, Tensor]:
        """Own parameters for an encoder that gets its inputs as they are, whose bias is lower by `shift`."""
        return {}


def of_lengths(code: Code, values: Float[Tensor, "*shape"], decoder: Float[Tensor, "n d"]) -> Float[Tensor, "*shape"]:
    """Numbers laid out as a code's, each times the length of its write vector."""
    lengths = decoder.norm(dim=1)
    return values * (lengths if code.support is None else lengths.index_select(0, code.support.col))


def tanh_penalty(config: DictionaryConfig, code: Code, decoder: Float[Tensor, "n d"]) -> Tensor:
    """Weighted strengths that saturate, so that it counts rather than shrinks them (Ameisen et al. 2025)."""
    return config.tanh * torch.tanh(config.tanh_scale * of_lengths(code, code.value, decoder)).sum() / code.rows


class ReLU(Activation):
    """ReLU with an L1 penalty on strengths, each weighted by the length of its write vector (Bricken et al. 2023; Conerly et al. 2024)."""

    @staticmethod
    def variant(config: DictionaryConfig) -> str:
        return f"tanh={config.tanh:g}" if config.sparsity == "tanh" else f"l1={config.l1:g}"

    def penalty(self, code: Code, decoder: Float[Tensor, "n d"]) -> Tensor:
        if self.config.sparsity == "tanh":
            return tanh_penalty(self.config, code, decoder)
        lengths = decoder.norm(dim=1)
        weighted = code.value @ lengths if code.support is None else code.value * lengths.index_select(0, code.support.col)
        return self.config.l1 * weighted.sum() / code.rows


def worthwhile(mask: Bool[Tensor, "rows n"]) -> Support | None:
    """The support of a mask where it is sparse enough to gain from it; elsewhere than on the CPU, finding out would be a wait."""
    if mask.device.type != "cpu" or int(mask.count_nonzero()) > DENSE_ABOVE * mask.numel():  # a sum takes ten times as long
        return None
    return support_of(mask)
