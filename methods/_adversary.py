"""Adversarial masks: sources r in [0, 1] that climb the reconstruction error, kept (VPD) or drawn in each step (SPD main: PGD)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from decomp_bench.decomposer import Batch, Codes, Point

from ._masks import interpolate, uniform_subset
from ._reconstruction import Rows, divergence, placed

if TYPE_CHECKING:
    from .spd import SPD

Scope = Literal["position", "row", "place", "shared"]
Init = Literal["random", "ones", "zeros"]
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

    def start(self, generator: torch.Generator, device: torch.device, init: Init = "random") -> None:
        """Sources without a past: uniform ones, or all ones or zeros."""
        self.count = 0
        for name, shape in self.shapes.items():
            made = torch.rand(shape, generator=generator, device=device) if init == "random" else torch.zeros(shape, device=device)
            self.value[name] = (made + 1 if init == "ones" else made).to(self.dtype)
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


class Adversary:
    """Sources of a decomposition in training, and what they remember from one step to the next."""

    def __init__(self, spd: SPD) -> None:
        config, target = spd.config, spd.target
        self.persists = config.adversary == "persistent"
        self.sources = Sources(
            {site.name: site.n for site in spd.sites}, config.adversary_scope, config.batch, target.context if target.is_lm else 1,
            Ascent(*config.adversary_betas, sign=not self.persists), getattr(torch, config.adversary_dtype),
        )  # fmt: skip
        self.leaves: dict[Point, Tensor] = {}
        self.rate = 0.0

    def error(self, spd: SPD, batch: Batch, rows: Rows, lower: dict[Point, Tensor], progress: float) -> Float[Tensor, ""]:
        """The error under the adversary's masks, after its ascents on this batch."""
        self.rate, config = self.rate_at(spd, progress), spd.config
        if config.adversary_routing == "layerwise":
            return torch.stack([self._climbed(spd, batch, rows, lower, self._alone(lower, name)) for name in lower]).mean()
        routed = None
        if config.adversary_routing == "subset":
            routed = dict(zip(lower, uniform_subset(len(rows.weight), len(lower), spd.uniforms, rows.weight.device).T, strict=True))
        return self._climbed(spd, batch, rows, lower, routed)

    @staticmethod
    def _alone(lower: dict[Point, Tensor], name: Point) -> dict[Point, Tensor]:
        return {other: torch.full(g.shape[:1], other == name, device=g.device) for other, g in lower.items()}

    def rate_at(self, spd: SPD, progress: float) -> float:
        """Rate of an ascent: a linear rise, then constant; fresh sources need no rise."""
        rise = spd.config.adversary_warmup if self.persists else 0.0
        return spd.config.adversary_lr * (min(1.0, progress / rise) if rise else 1.0)

    def _climbed(self, spd: SPD, batch: Batch, rows: Rows, lower: dict[Point, Tensor], routed: dict[Point, Tensor] | None) -> Tensor:
        assert batch.x is not None
        target, generator = spd.target, spd.uniforms.generator(spd.target.device)
        if not self.sources.value or not self.persists:
            self.sources.start(generator, target.device, spd.config.adversary_init)
        self.sources.reach(batch.x.shape[1] if target.is_lm else 1, generator, target.device)
        fixed = {name: g.detach() for name, g in lower.items()}
        with _frozen(spd):
            for _ in range(spd.config.adversary_steps):
                leaves = self.sources.leaves()
                error = divergence(spd, batch, rows, self._codes(spd, batch, rows, fixed, leaves, routed), spd.layers)
                gradients = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
                found = zip(leaves, gradients, strict=True)
                self.sources.ascend({name: gradient for name, gradient in found if gradient is not None}, self.rate)
        self.leaves = self.sources.leaves() if self.persists else {}
        sources = self.leaves or self.sources.value
        return divergence(spd, batch, rows, self._codes(spd, batch, rows, lower, sources, routed), spd.layers)

    def _codes(self, spd: SPD, batch: Batch, rows: Rows, lower: dict[Point, Tensor], sources: dict[Point, Tensor],
               routed: dict[Point, Tensor] | None) -> Codes:
        """Codes with masks g + (1 - g) r at every row that counts and is routed."""
        assert batch.x is not None
        shape, first = (len(batch.x), batch.x.shape[1] if spd.target.is_lm else 1), int(spd.target.keeps_first)
        codes: Codes = {}
        for name, g in lower.items():
            source = at_rows(sources[name].to(g.dtype), rows, shape, first)
            mask, remainder = interpolate(g, source[:, :-1]), source[:, -1] if spd.config.delta else None
            codes[name] = placed(mask, remainder, rows, None if routed is None else routed[name])
        return codes

    def after_step(self, weight: float) -> None:
        """Let persistent sources climb the gradient of the step's own pass, in which the error had this weight."""
        gradients = {name: leaf.grad / weight for name, leaf in self.leaves.items() if leaf.grad is not None}
        self.leaves = {}
        if gradients:
            self.sources.ascend(gradients, self.rate)

    def state(self) -> dict[str, Tensor]:
        """What a resumed training needs."""
        kept = self.sources.state() if self.persists and self.sources.value else {}
        return {f"adversary.{key}": value for key, value in kept.items()}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take back what `state` gave."""
        kept = {key.removeprefix("adversary."): value for key, value in state.items() if key.startswith("adversary.")}
        if kept:
            self.sources.load(kept, device)


@contextmanager
def _frozen(spd: SPD) -> Iterator[None]:
    """Components without gradients: the ascents need those of the sources alone."""
    parameters = list(spd.parts.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
