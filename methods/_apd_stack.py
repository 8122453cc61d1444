"""APD's loss for several seeds at once: everything of a step as one function of tensors, A [S, n, d_in, m] and B [S, n, m, d_out].

Rows on which no map reads anything are left out: no component has an effect on them, nor errs on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from decomp_bench.decomposer import Batch, Point
from decomp_bench.targets.base import JACOBIAN

from ._gates import key_of
from ._reconstruction import gathers
from ._stacked_maps import StackedMaps, Written

if TYPE_CHECKING:
    from .apd import APD

NUMBERS = 1 << 22
"""Inner activations that one batched step is best kept below: beyond it, arithmetic takes all the time, and caches overflow."""


def together(apd: APD) -> int:
    """How many seeds are best computed at once."""
    widest = max(apd.part(site.name)[0].shape[2] for site in apd.sites)
    return max(1, NUMBERS // (apd.config.batch * apd.config.components * widest))


class StackedAPD:
    """A `StackedLoss`. Inputs: `x` and `y` of the rows, what each map reads and the derivative of the outputs by what it writes there."""

    def __init__(self, members: Sequence[APD]) -> None:
        self.members, self.head = list(members), members[0]
        self.config, self.target, self.own = self.head.config, self.head.target, self.head._own
        self.points = [site.name for site in self.head.sites]
        self.maps = StackedMaps(self.target, self.own)
        self.size = sum(weight.numel() for weight, _ in self.own.values())
        self.rows = dict.fromkeys(("x", "y", *self.points, *(point + JACOBIAN for point in self.points)), 0)

    def prepare(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """See `decomp_bench.stacking`."""
        assert batch.x is not None
        assert batch.logits is not None
        inputs = {"x": batch.x, "y": batch.logits, **{point: batch.clean[point] for point in self.rows if point in batch.clean}}
        if not gathers(batch.x.device):
            return inputs
        heard = torch.stack([(inputs[point] != 0).any(1) for point in self.points]).any(0).nonzero().flatten()
        return {name: value[heard] for name, value in inputs.items()}

    def settle(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing: each member normalises its own."""

    def compute(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `decomp_bench.stacking`."""
        config, batch = self.config, self.config.batch
        parts = {point: self._part(weights, point) for point in self.points}
        gate = self._gate(parts, inputs)
        x = inputs["x"].expand(len(self.members), -1, -1)
        output, read = self.maps.run(x, {point: _switched(*part, gate) for point, part in parts.items()})
        with torch.autocast(self.target.device.type, enabled=False):
            totals = {point: (A.transpose(1, 2).flatten(2) @ B.flatten(1, 2)).mT for point, (A, B) in parts.items()}
            unfaithful = torch.stack([(total - self.own[point][0]).square().sum((1, 2)) for point, total in totals.items()]).sum(0)
        share = gate.sum(1) / batch
        terms = {
            "faithfulness": config.faithfulness * unfaithful / self.size,
            "recon": config.recon * (output - inputs["y"]).square().mean(-1).sum(1) / batch,
            "simplicity": config.simplicity * (share * self._schatten(parts)).sum(1) / self.size,
        }
        if config.activation:
            last = [self.target.maps(layer)[-1] for layer in self.head.layers]
            errors = torch.stack([(read[point] - inputs[point]).square().sum(-1).sum(1) for point in last]).sum(0) / batch
            terms["activation"] = config.activation * errors / sum(self.target.size(point) for point in last)
        return terms, {"l0": share.sum(1)}

    def _part(self, weights: Mapping[str, Tensor], point: Point) -> tuple[Float[Tensor, "S n d_in m"], Float[Tensor, "S n m d_out"]]:
        A, B = (weights[f"{which}.{key_of(point)}"] for which in "AB")
        return (_Tangent.apply(A) if self.config.unit_norm else A), B  # type: ignore[return-value]

    @torch.no_grad()
    def _gate(self, parts: Mapping[Point, tuple[Tensor, Tensor]], inputs: Mapping[str, Tensor]) -> Float[Tensor, "S rows n"]:
        """Batch top-k of the attributions, over the whole batch."""
        effect: Tensor | float = 0.0
        for point, (A, B) in parts.items():
            runs, n, _, m = A.shape
            inner = (inputs[point] @ A.transpose(1, 2).flatten(2)).unflatten(-1, (n, m))
            written = inner.permute(0, 2, 1, 3) @ B  # [S, n, rows, d_out]
            effect = effect + torch.einsum("roe,snre->srno", inputs[point + JACOBIAN], written)
        score = effect.square().mean(-1).sqrt().flatten(1)  # type: ignore[union-attr]
        count = min(int(self.config.k * self.config.batch), self.config.batch * n)
        best = score.topk(min(count, score.shape[1])).indices
        return torch.zeros_like(score).scatter(1, best, 1.0).view(runs, -1, n)

    def _schatten(self, parts: Mapping[Point, tuple[Tensor, Tensor]]) -> Float[Tensor, "S n"]:
        found = [A.square().sum(2) * B.square().sum(3) for A, B in parts.values()]
        return torch.stack([(part + 1e-16).pow(self.config.schatten / 2).sum(2) for part in found]).sum(0)


def _switched(A: Tensor, B: Tensor, gate: Float[Tensor, "S rows n"]) -> Written:
    """What a map writes with these components on."""

    def write(x: Tensor) -> Tensor:
        inner = (x @ A.transpose(1, 2).flatten(2)).unflatten(-1, (A.shape[1], A.shape[3]))
        return (inner * gate[..., None]).flatten(2) @ B.flatten(1, 2)

    return write


class _Tangent(torch.autograd.Function):
    """A itself, whose gradient keeps the lengths of A[S, n, :, m] to first order."""

    @staticmethod
    def forward(ctx, A):
        ctx.save_for_backward(A)
        return A.view_as(A)

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        (A,) = ctx.saved_tensors
        return g - (g * A).sum(2, keepdim=True) * A
