"""SPD's loss for several seeds at once, on toys: everything of a step but its choices and draws, as one function of tensors.

V [S, d_in, C], U [S, C, d_out] and the gates of S decompositions are multiplied in batches; what the clean target computes is computed once
for all. Masks, importances and penalties are those of `_masks`, `_importance` and `_components`, written such that a compiler fuses them:
rows come last, so that everything elementwise, and every sum over rows, runs along memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decomp_bench.decomposer import Batch, Point

from ._components import tied_pairs
from ._gates import key_of
from ._importance import LEAK
from ._reconstruction import distinct_rows
from ._stacked_maps import StackedMaps, Written

if TYPE_CHECKING:
    from ._spd_config import SPDConfig
    from .spd import SPD

NUMBERS = 1 << 22
"""Hidden activations of gates that one batched step is best kept below: beyond it, arithmetic takes all the time, and caches overflow."""


def fits(config: SPDConfig) -> bool:
    """Whether a config asks for nothing but what is computed here."""
    given = (config.subset, config.ci_masked, config.ci_layerwise, config.ci_subset, config.unmasked)
    others = (*given, config.self_gated, config.self_masked, config.hidden, config.schatten, config.adversarial)
    return config.gate == "scalar" and config.samples == 1 and not any(others)


def together(spd: SPD) -> int:
    """How many seeds are best computed at once."""
    hidden = max(spd.config.gate_hidden or (16,))
    return max(1, NUMBERS // (spd.config.batch * hidden * max(site.n for site in spd.sites)))


class StackedSPD:
    """A `StackedLoss`. Inputs: `x`, `y` and `weight` of the rows; `uniforms` [S, numbers a row, rows], of which each masked map of a pass
    has its own; `value` of a penalty that is annealed and `count` of the rows of a batch, where they are needed."""

    def __init__(self, members: Sequence[SPD]) -> None:
        self.members, head = list(members), members[0]
        self.config, self.target, self.points = head.config, head.target, head.points()
        self.names, self.device = [site.name for site in head.sites], head.target.device
        self.own = {name: head._own[name] for name in self.names}
        passes = {"stochastic": self.names} if self.config.stochastic else {}
        passes |= {f"layerwise {name}": [name] for name in self.names if self.config.layerwise}
        self.passes: dict[str, dict[Point, slice]] = {}
        """For each pass and masked map, where its components' uniform numbers lie; that of the remainder follows them."""
        sizes, self.numbers = {site.name: site.n for site in head.sites}, 0
        for part, names in passes.items():
            self.passes[part] = {}
            for name in names:
                self.passes[part][name] = slice(self.numbers, self.numbers + sizes[name])
                self.numbers += sizes[name] + int(self.config.delta)
        smooth = self.config.penalty == "smooth_l0"
        self.annealed = (self.config.gamma_end if smooth else self.config.p_end) is not None
        self.rows = {"x": 0, "y": 0, "weight": 0, "uniforms": 2}
        self.maps = StackedMaps(self.target, self.own)
        self._tied = tied_pairs(head.components, head.weights) if self.config.tied else []
        self._were = {one: [torch.stack([getattr(member.components[one], which).detach() for member in members]) for which in "VU"]
                      for one, _ in self._tied}  # fmt: skip

    @property
    def _last(self) -> str:
        """The term that the log shows the error of."""
        return "layerwise" if self.config.layerwise else "stochastic" if self.config.stochastic else ""

    # ---- what is not a function of the weights

    def prepare(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """See `decomp_bench.stacking`."""
        assert batch.x is not None
        assert batch.logits is not None
        x, y, count = batch.x, batch.logits, len(batch.x)
        kept = distinct_rows(batch, self.points) if self.config.collapse else None
        if kept is None:
            weight = torch.full((count,), 1 / count, device=self.device)
        else:
            index, weight = kept
            x, y = x[index], y[index]
        drawn = [member.uniforms.draw(self.numbers, len(weight), device=self.device) for member in self.members]
        inputs = {"x": x, "y": y, "weight": weight, "uniforms": torch.stack(drawn)}
        if self.annealed:
            inputs["value"] = torch.tensor(self.members[0]._penalty(progress).value, device=self.device)
        if self.config.beta:
            inputs["count"] = torch.tensor(float(count), device=self.device)
        return inputs

    @torch.no_grad()
    def settle(self, weights: Mapping[str, Tensor]) -> None:
        """See `decomp_bench.stacking`: what is tied lies in two places here, and each is moved by what the step did to both."""
        for one, other in self._tied:
            first, second = (f"parts.{key_of(name)}." for name in (one, other))
            for mine, its, was in zip("VU", "UV", self._were[one], strict=True):
                here, there = weights[first + mine], weights[second + its]
                here += there.mT - was
                there.copy_(here.mT)
                was.copy_(here)

    # ---- what is

    def compute(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `decomp_bench.stacking`."""
        config, weight = self.config, inputs["weight"]
        parts = {name: (weights[f"parts.{key_of(name)}.V"], weights[f"parts.{key_of(name)}.U"]) for name in self.names}
        x = inputs["x"].expand(len(self.members), -1, -1)
        _, clean = self.maps.run(x, {})
        lower, minimality, frequency = {}, [], []
        for name in self.names:
            z = self._logits(weights, name, _strength(clean[name], parts[name][0]))
            lower[name] = cast(Tensor, _Lower.apply(z, config.sigmoid == "straight_through"))
            minimality.append(self._minimality(z, weight, inputs))
            frequency.append(((z > 0) * weight).sum(-1))
        faith = self._faithfulness(parts)
        terms = {"faithfulness": config.faithfulness * faith, "importance": config.importance * torch.stack(minimality).sum(0)}
        errors = {part: self._error(part, x, parts, lower, inputs) for part in self.passes}
        if config.stochastic:
            terms["stochastic"] = config.stochastic * errors["stochastic"]
        if config.layerwise:
            terms["layerwise"] = config.layerwise * torch.stack([errors[f"layerwise {name}"] for name in self.names]).mean(0)
        l0 = torch.stack([often.sum(1) for often in frequency]).sum(0) / len(self.members[0].layers)
        statistics = {"l0": l0, "dead": (torch.cat(frequency, 1) == 0).float().mean(1), "faith": faith}
        return terms, statistics | ({"mse": terms[last] / getattr(config, last)} if (last := self._last) else {})

    def _logits(self, weights: Mapping[str, Tensor], name: Point, strength: Float[Tensor, "S C rows"]) -> Float[Tensor, "S C rows"]:
        """The gates: C MLPs 1 -> hidden -> 1, whose activations are [S, C, hidden, rows]."""
        value, gate = strength[:, :, None], f"gates.{key_of(name)}."
        for layer in range(sum(key.startswith(f"{gate}weights.") for key in weights)):
            weight, bias = weights[f"{gate}weights.{layer}"], weights[f"{gate}biases.{layer}"]
            value = F.gelu(value) if layer else value
            if weight.shape[2] == 1:
                value = value * weight.mT
            elif weight.shape[3] == 1:
                value = (value * weight).sum(2, keepdim=True)
            else:
                value = weight.mT @ value
            value = value + bias[..., None]
        return value.squeeze(2)

    def _minimality(self, z: Float[Tensor, "S C rows"], weight: Float[Tensor, " rows"], inputs: Mapping[str, Tensor]
                    ) -> Float[Tensor, " S"]:
        config, smooth = self.config, self.config.penalty == "smooth_l0"
        value = inputs["value"] if self.annealed else config.gamma if smooth else config.p
        upper = torch.where(z > 1, 1 + LEAK * (z - 1), torch.relu(z))
        phi = upper.square() / (upper.square() + value * value) if smooth else (upper + config.p_eps).pow(value)
        mean = (phi * weight).sum(-1)
        return (mean * (1 + config.beta * torch.log2(1 + mean * inputs["count"]))).sum(1) if config.beta else mean.sum(1)

    def _faithfulness(self, parts: Mapping[Point, tuple[Tensor, Tensor]]) -> Float[Tensor, " S"]:
        with torch.autocast(self.device.type, enabled=False):
            errors = [(self.own[name][0].T - V @ U).square().sum((1, 2)) for name, (V, U) in parts.items()]
        return torch.stack(errors).sum(0) / sum(weight.numel() for weight, _ in self.own.values())

    def _error(self, part: str, x: Float[Tensor, "S rows d"], parts: Mapping[Point, tuple[Tensor, Tensor]], lower: Mapping[Point, Tensor],
               inputs: Mapping[str, Tensor]) -> Float[Tensor, " S"]:
        """Mean squared error of the output in one pass."""
        written = {}
        for name, place in self.passes[part].items():
            source, remainder = inputs["uniforms"][:, place], inputs["uniforms"][:, place.stop] if self.config.delta else None
            written[name] = _masked(self.own[name][0], *parts[name], source + lower[name] * (1 - source), remainder)
        return (self.maps.run(x, written)[0] - inputs["y"]).square().mean(-1) @ inputs["weight"]


def _strength(x: Float[Tensor, "S rows d_in"], V: Float[Tensor, "S d_in C"]) -> Float[Tensor, "S C rows"]:
    return V.mT @ x.mT


class _Lower(torch.autograd.Function):
    """Lower importances [S, C, rows] of logits, with the slopes that `importances` states."""

    @staticmethod
    def forward(ctx, z, straight):
        ctx.save_for_backward(z)
        ctx.straight = straight
        return z.clamp(0, 1) if straight else z.clamp(0, 1) + LEAK * z.clamp(max=0)

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        (z,) = ctx.saved_tensors
        leaking = g.clamp(max=0) if ctx.straight else g
        return torch.where(z > 0, torch.where(z > 1, 0.0, g), LEAK * leaking), None


def _masked(own: Tensor, V: Tensor, U: Tensor, mask: Float[Tensor, "S C rows"], delta: Float[Tensor, "S rows"] | None) -> Written:
    """What a map writes with its components masked and, where there is one, so much of the remainder let through."""

    def write(x: Tensor) -> Tensor:
        if delta is None:
            return (_strength(x, V) * mask).mT @ U
        return delta[..., None] * F.linear(x, own) + (_strength(x, V) * (mask - delta[:, None])).mT @ U

    return write
