"""Gated: one decision whether a component is on, another how strong it is, from the same read vector."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decomp_bench.decomposer import Choice

from ._activations import Activation, Code, of_lengths, worthwhile
from ._dictionary_config import DictionaryConfig
from ._sparse import Support


class Gated(Activation):
    """The gate is open where W_enc x + b_enc > 0; the strength is relu(exp(r_mag) W_enc x + b_mag) (Rajamanoharan et al. 2024).

    A step function has no gradient, so the gate learns by two terms on relu(W_enc x + b_enc): an L1 penalty, and a reconstruction from
    them, through which the paper trains no decoder. b_enc takes no part in the strength.
    """

    def __init__(self, config: DictionaryConfig, features: int, bias: Float[Tensor, " features"]) -> None:
        super().__init__(config, features, bias)
        self.r_mag, self.b_mag = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))
        self._gate_bias = [bias]  # in a list: the coder's parameter, not another one of this module's

    @staticmethod
    def variant(config: DictionaryConfig) -> str:
        return f"l1={config.l1:g}"

    def strength(self, pre: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        return self._magnitude(pre).relu()

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        return ((pre > 0) & (self._magnitude(pre) > max(choice.threshold or 0.0, 0.0))).to(pre.dtype)

    def support(self, pre: Float[Tensor, "rows n"], k: int | None = None) -> Support | None:
        return worthwhile(pre > 0)

    def value(self, pre: Float[Tensor, "*shape"], col: Int[Tensor, " active"] | None = None) -> Float[Tensor, "*shape"]:
        return self._magnitude(pre, col).relu() * (pre > 0)

    def penalty(self, code: Code, decoder: Float[Tensor, "n d"]) -> Tensor:
        return self.config.l1 * of_lengths(code, code.pre.relu(), decoder).sum() / code.rows

    def open(self, code: Code) -> Code:
        return replace(code, value=code.pre.relu())

    def _magnitude(self, pre: Float[Tensor, "*shape"], col: Int[Tensor, " active"] | None = None) -> Float[Tensor, "*shape"]:
        scale, bias, gate_bias = (p if col is None else p.index_select(0, col) for p in (self.r_mag.exp(), self.b_mag, *self._gate_bias))
        return scale * (pre - gate_bias) + bias

    @torch.no_grad()
    def restart(self, ids: Int[Tensor, " dead"]) -> list[nn.Parameter]:
        self.r_mag[ids], self.b_mag[ids] = 0.0, 0.0
        return [self.r_mag, self.b_mag]

    def folded(self, shift: Float[Tensor, " n"]) -> dict[str, Tensor]:
        return {"r_mag": self.r_mag, "b_mag": self.b_mag - self.r_mag.exp() * shift}
