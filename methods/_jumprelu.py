"""JumpReLU: a threshold for each component, learned through pseudo-gradients."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decomp_bench.decomposer import Choice

from ._activations import Activation, Code, tanh_penalty, worthwhile
from ._dictionary_config import DictionaryConfig
from ._sparse import Support


class JumpReLU(Activation):
    """A threshold for each component, learned through rectangle-kernel pseudo-gradients, with an L0 penalty (Rajamanoharan et al. 2024).

    The tanh penalty with `ste_to_input` and `revive=pre_act` is Anthropic's recipe (January 2025).
    """

    thresholds = (1.0, 1.5, 2.0, 3.0)

    def __init__(self, config: DictionaryConfig, features: int, bias: Float[Tensor, " features"]) -> None:
        super().__init__(config, features, bias)
        self.log_threshold = nn.Parameter(torch.full((features,), math.log(config.threshold_init)))

    @staticmethod
    def variant(config: DictionaryConfig) -> str:
        return f"{config.sparsity}={getattr(config, config.sparsity or 'l0'):g}"

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        return (pre > self.log_threshold.exp().clamp(min=choice.threshold or 0.0)).to(pre.dtype)

    def support(self, pre: Float[Tensor, "rows n"], k: int | None = None) -> Support | None:
        return worthwhile(pre > self.log_threshold.exp() - self.config.bandwidth / 2)

    def value(self, pre: Float[Tensor, "*shape"], col: Int[Tensor, " active"] | None = None) -> Float[Tensor, "*shape"]:
        return _Jump.apply(pre, self._log_threshold(pre, col), self.config.bandwidth, self.config.ste_to_input)  # type: ignore[return-value]

    def penalty(self, code: Code, decoder: Float[Tensor, "n d"]) -> Tensor:
        config = self.config
        if config.sparsity == "tanh":
            return tanh_penalty(config, code, decoder)
        log_threshold = self._log_threshold(code.pre, None if code.support is None else code.support.col)
        active: Tensor = _Step.apply(code.pre, log_threshold, config.bandwidth, config.ste_to_input)  # type: ignore[assignment]
        if config.sparsity == "l0":
            return config.l0 * active.sum() / code.rows
        return config.l0 * (2 / config.target_l0) * (code.of_rows(active) - config.target_l0).square().mean()

    def below(self, pre: Float[Tensor, "rows dead"], ids: Int[Tensor, " dead"], decoder: Float[Tensor, "n d"]) -> Tensor:
        """How far some components are below their thresholds, each times the length of its write vector; a mean over rows of sums."""
        short = (self.log_threshold[ids].exp() - pre).relu()
        return (short * decoder[ids].norm(dim=1)).sum(1).mean()

    @torch.no_grad()
    def restart(self, ids: Int[Tensor, " dead"]) -> list[nn.Parameter]:
        self.log_threshold[ids] = math.log(self.config.threshold_init)
        return [self.log_threshold]

    def _log_threshold(self, pre: Tensor, col: Tensor | None) -> Tensor:
        return self.log_threshold.expand_as(pre) if col is None else self.log_threshold.index_select(0, col)


class _Jump(torch.autograd.Function):
    """z where z > theta, else 0. d/dtheta = -theta/w where |z - theta| < w/2; the chain rule to log theta adds a factor theta.

    With `to_input`, d/dz has +theta/w there too.
    """

    @staticmethod
    def forward(ctx, pre, log_threshold, width, to_input):
        threshold = log_threshold.exp()
        ctx.save_for_backward(pre, threshold)
        ctx.width, ctx.to_input = width, to_input
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        d_log_threshold = torch.where(near, grad, 0.0) * threshold.square() * (-1 / ctx.width)
        d_pre = torch.where(pre > threshold, grad, 0.0)
        if ctx.to_input:
            d_pre = d_pre + torch.where(near, grad, 0.0) * threshold / ctx.width
        return d_pre, d_log_threshold, None, None


class _Step(torch.autograd.Function):
    """1 where z > theta, else 0. d/dtheta = -1/w where |z - theta| < w/2, and none with respect to z, or +1/w with `to_input`."""

    @staticmethod
    def forward(ctx, pre, log_threshold, width, to_input):
        threshold = log_threshold.exp()
        ctx.save_for_backward(pre, threshold)
        ctx.width, ctx.to_input = width, to_input
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        d_pre = torch.where(near, grad, 0.0) / ctx.width if ctx.to_input else None
        return d_pre, torch.where(near, grad, 0.0) * threshold * (-1 / ctx.width), None, None
