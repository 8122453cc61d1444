"""Adversarial masks: sources r in [0, 1] that climb the reconstruction error, kept (VPD) or drawn in each step (SPD main: PGD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from decomp_bench.decomposer import Point, SiteCodes

from ._components import RoutedCodes
from ._masks import interpolate
from ._reconstruction import Rows, gathers

Scope = Literal["position", "row", "place", "shared"]
EPS = 1e-8


@dataclass
class Ascent:
    """How sources climb: by Adam without weight decay (persistent ones), or by the sign of the gradient (fresh ones)."""

    beta1: float = 0.5
    beta2: float = 0.99
    sign: bool = False


class Sources:
    """One source for each component of each site and one for its remainder, for each position, row or place of a batch, or for all.

    `position`: [B, T, C + 1]; `row`: [B, 1, C + 1], shared along a row; `place`: [1, T, C + 1], shared over the batch; `shared`:
    [1, 1, C + 1]. T counts every position of a row, those that are never replaced too; a toy's rows have one. They are held in `dtype` and
    moved in float32.
    """

    def __init__(self, sizes: dict[Point, int], scope: Scope, rows: int, places: int, ascent: Ascent, dtype: torch.dtype = torch.float32
                 ) -> None:  # fmt: skip
        shape = (rows if scope in ("position", "row") else 1, places if scope in ("position", "place") else 1)
        self.shapes = {name: (*shape, n + 1) for name, n in sizes.items()}
        self.ascent, self.dtype = ascent, dtype
        self.value: dict[Point, Tensor] = {}
        self.moments: dict[Point, tuple[Tensor, Tensor]] = {}
        self.count = 0
        """Ascents so far: Adam's bias correction."""

    def start(self, generator: torch.Generator, device: torch.device) -> None:
        """Uniform sources, without a past."""
        self.count = 0
        for name, shape in self.shapes.items():
            self.value[name] = torch.rand(shape, generator=generator, device=device).to(self.dtype)
            if not self.ascent.sign:
                self.moments[name] = (torch.zeros_like(self.value[name]), torch.zeros_like(self.value[name]))

    def reach(self, places: int, generator: torch.Generator, device: torch.device) -> None:
        """Sources for rows longer than any before, where places have their own: uniform ones are added."""
        for name, value in self.value.items():
            missing = places - value.shape[1] if value.shape[1] > 1 else 0
            if missing > 0:
                more = torch.rand(value.shape[0], missing, value.shape[2], generator=generator, device=device).to(self.dtype)
                self.value[name] = torch.cat([value, more], 1)
                if name in self.moments:
                    first, second = (torch.cat([moment, torch.zeros_like(more)], 1) for moment in self.moments[name])
                    self.moments[name] = (first, second)

    def leaves(self) -> dict[Point, Float[Tensor, "B T _"]]:
        """The sources as they are, to be differentiated by."""
        return {name: value.float().detach().requires_grad_() for name, value in self.value.items()}

    @torch.no_grad()
    def ascend(self, gradients: dict[Point, Tensor], rate: float) -> None:
        """One step up the gradients, and back into [0, 1]."""
        self.count += 1
        for name, gradient in gradients.items():
            value = self.value[name].float()
            if self.ascent.sign:
                value.add_(gradient.sign(), alpha=rate)
            else:
                value.add_(self._adam(name, gradient), alpha=rate)
            self.value[name].copy_(value.clamp_(0, 1))

    def _adam(self, name: Point, gradient: Tensor) -> Tensor:
        first, second = (moment.float() for moment in self.moments[name])
        first.lerp_(gradient, 1 - self.ascent.beta1)
        second.lerp_(gradient.square(), 1 - self.ascent.beta2)
        for kept, moment in zip(self.moments[name], (first, second), strict=True):
            kept.copy_(moment)
        first = first / (1 - self.ascent.beta1**self.count)
        second = second / (1 - self.ascent.beta2**self.count)
        return first / (second.sqrt() + EPS)

    # ---- a resumed training

    def state(self) -> dict[str, Tensor]:
        """Everything that the next ascent depends on."""
        found = {f"source.{name}": value for name, value in self.value.items()}
        for name, (first, second) in self.moments.items():
            found |= {f"first.{name}": first, f"second.{name}": second}
        return {**found, "ascents": torch.tensor(self.count)}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take back what `state` gave."""
        kept = {key: value.to(device) for key, value in state.items()}
        self.count = int(state["ascents"])
        self.value = {name: kept[f"source.{name}"].to(self.dtype) for name in self.shapes}
        if not self.ascent.sign:
            self.moments = {name: (kept[f"first.{name}"].to(self.dtype), kept[f"second.{name}"].to(self.dtype)) for name in self.shapes}


def at_rows(source: Float[Tensor, "B T n"], rows: Rows, shape: tuple[int, int], first: int) -> Float[Tensor, "rows n"]:
    """Sources at the rows that count, of a batch of `shape` [B, T] whose first positions are never replaced."""
    batch, places = shape
    if source.shape[0] > 1:
        source = source[:batch]
    if source.shape[1] > 1:
        source = source[:, first:places]
    return rows.of(source.expand(batch, places - first, source.shape[-1]))


def adversarial(lower: Float[Tensor, "rows C"], source: Float[Tensor, "rows sources"], rows: Rows, delta: bool) -> SiteCodes:
    """Codes of one site with masks g + (1 - g) r at every row that counts; their strength is a stand-in, as in `masked`."""
    mask, remainder = interpolate(lower, source[:, :-1]), source[:, -1] if delta else None
    if gathers(lower.device) and rows.index is not None:
        return RoutedCodes(mask, mask, remainder, rows.index)
    return SiteCodes(mask, mask, remainder)
