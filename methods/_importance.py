"""Causal importances: the sigmoids behind masks and penalties, and the penalties.

One logit z gives two importances (SPD, Bushnaq et al. 2025): a lower one in [0, 1] from which masks are made, and an upper one, growing
slowly above 1, which is penalised. Slopes at the kinks are stated here and not inherited from a torch version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

threshold_backward, hardtanh_backward = torch.ops.aten.threshold_backward, torch.ops.aten.hardtanh_backward
LEAK = 0.01
_ABOVE_ONE = 1 + 2**-23  # torch's hardtanh backward cuts at its upper end itself; the slope at z = 1 is meant to be 1
_CHUNK = 1 << 16  # elements of a chunk: what one needs at once stays in a core's cache


@dataclass(frozen=True)
class Penalty:
    """phi, which counts an importance g: (g + eps)^p (`lp`, SPD) or g^2 / (g^2 + gamma^2) (`smooth_l0`, whose gradient is bounded).

    `value` is p or gamma. With `beta`, components that are frequent cost more: mu_c (1 + beta log2(1 + s_c)), mu_c the mean and s_c the
    sum of phi over positions (SPD main, VPD).
    """

    kind: Literal["lp", "smooth_l0"]
    value: float
    beta: float = 0.0
    eps: float = 1e-12

    def __call__(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """phi and its derivative."""
        if self.kind == "lp":
            base = g + self.eps
            phi = base.pow(self.value)
            return phi, base.reciprocal_().mul_(phi).mul_(self.value)
        square = g * g
        inverse = (square + self.value**2).reciprocal_()
        return square.mul_(inverse), inverse.square().mul_(g).mul_(2 * self.value**2)


class _Importances(torch.autograd.Function):
    """Everything elementwise between logits and losses, chunk by chunk: one by one, these passes cost as much as the matrix products.

    Comparisons and torch.where are avoided because they are several times slower than arithmetic on CPUs.
    """

    @staticmethod
    def forward(ctx, z, weight, count, penalty, straight):
        lower, slope = torch.empty_like(z), torch.empty_like(z)
        mean, frequency = z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1])
        for zc, w, low, out in _chunks(z, weight, lower, slope):
            torch.clamp(zc, 0, 1, out=low)
            frequency.addmv_(low.sign().T, w)
            upper = (zc - 1).clamp_(min=0).mul_(LEAK).add_(low)
            phi, d_upper = penalty(upper)
            mean.addmv_(phi.T, w)
            d_z = threshold_backward(d_upper, zc, 0.0)
            d_z.sub_(threshold_backward(d_z, zc, 1.0), alpha=1 - LEAK)
            torch.mul(d_z, w[:, None], out=out)
            if not straight:
                low.add_(zc.clamp(max=0), alpha=LEAK)
        total = mean * count
        bits = torch.log2(1 + total)
        ctx.straight = straight
        ctx.save_for_backward(z, slope, 1 + penalty.beta * (bits + total / ((1 + total) * math.log(2))))
        ctx.mark_non_differentiable(frequency)
        return lower, (mean * (1 + penalty.beta * bits)).sum(), frequency

    @staticmethod
    def backward(ctx, d_lower, d_penalty, _):  # type: ignore[override]
        z, slope, coefficient = ctx.saved_tensors
        d_z = torch.empty_like(z)
        coefficient = coefficient * d_penalty
        for zc, g, s, out in _chunks(z, d_lower, slope, d_z):
            leaking = g.clamp(max=0) if ctx.straight else g.clone()
            leaking.sub_(threshold_backward(leaking, zc, 0.0))
            inside = hardtanh_backward(g, zc, 0.0, _ABOVE_ONE).add_(leaking, alpha=LEAK)
            torch.addcmul(inside, s, coefficient, out=out)
        return d_z, None, None, None, None


def _chunks(z: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of several tensors together, few at a time on a CPU and all at once elsewhere."""
    rows = max(1, _CHUNK // z.shape[1]) if z.device.type == "cpu" else max(1, len(z))
    return zip(*(tensor.split(rows) for tensor in (z, *others)), strict=True)


def importances(z: Float[Tensor, "rows C"], weight: Float[Tensor, " rows"], count: float | Tensor, penalty: Penalty, straight: bool = True
                ) -> tuple[Float[Tensor, "rows C"], Float[Tensor, ""], Float[Tensor, " C"]]:
    """From the logits of one site: lower importances, importance minimality, and how often each component is active.

    Lower importances are clamp(z, 0, 1). `straight` (SPD main, VPD): below 0 the backward pass has a slope of 0.01 for those gradients only
    that would raise z. Otherwise (SPD paper) they are 0.01 z there, slightly negative. Minimality is the penalty of the upper importances,
    max(z, 0) up to 1 and 1 + 0.01 (z - 1) above. Slopes at the kinks are fixed: at z = 0 the lower side's, at z = 1 one. `weight` averages
    over the `count` real rows: 1 / count there, 0 at padding. All in float32, whatever the logits are in.
    """
    return _Importances.apply(z.float(), weight, count, penalty, straight)  # type: ignore[return-value]


def annealed(start: float, end: float | None, progress: float, begin: float, finish: float, geometric: bool = False) -> float:
    """A value that stays at `start` until `begin` of the run, then moves to `end` by `finish`: linearly (p) or geometrically (gamma)."""
    if end is None or progress < begin:
        return start
    share = 1.0 if progress >= finish else (progress - begin) / (finish - begin)
    return start * (end / start) ** share if geometric else start + (end - start) * share


def schatten(z: Float[Tensor, "rows C"], weight: Float[Tensor, " rows"], V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"], p: float,
             eps: float) -> Float[Tensor, ""]:
    """L_p of the upper importances of one site, each component times its |V_c|^2 + |U_c|^2 (the penalty of SPD's paper code)."""
    upper = torch.where(z > 1, 1 + LEAK * (z - 1), z.clamp(min=0))
    return (weight @ (upper + eps).pow(p)) @ (V.square().sum(0) + U.square().sum(1))
