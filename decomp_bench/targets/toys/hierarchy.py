"""A planted hierarchy: a child feature is only ever on beside its parent, so that a sparse code may absorb the parent into the child.

A TMS model whose columns of W are given, nearly orthogonal unit directions times one scale; the scale and the bias alone are trained.
Parents come first: feature i < parents is a parent, feature parents + children i + k its child k. With probability `probability` a parent
is on, and with it, with probability `together`, exactly one of its children. Values are uniform on [0.5, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decomp_bench.targets.base import TargetModel
from decomp_bench.targets.toys.tms import tms_target
from decomp_bench.targets.toys.truth import Toy


def spread_directions(features: int, hidden: int, generator: torch.Generator, steps: int = 500) -> Float[Tensor, "hidden features"]:
    """Unit directions that are pushed apart: their largest cosines are made small."""
    raw = torch.randn(hidden, features, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=0.02)
    with torch.enable_grad():
        for _ in range(steps):
            unit = raw / raw.norm(dim=0)
            gram = (unit.T @ unit).fill_diagonal_(0)
            optimiser.zero_grad()
            (40 * gram.square()).flatten().logsumexp(0).backward()
            optimiser.step()
    return (raw / raw.norm(dim=0)).detach()


@dataclass(frozen=True)
class Hierarchy:
    """Accepted where each feature alone, and each child with its parent, is put out as at least `gate` of itself."""

    parents: int = 6
    children: int = 3
    hidden: int = 16
    probability: float = 0.1
    together: float = 0.6
    steps: int = 1500
    batch: int = 512
    lr: float = 1e-2
    gate: float = 0.5

    @property
    def features(self) -> int:
        """Parents and children."""
        return self.parents * (1 + self.children)

    @property
    def parent(self) -> Int[Tensor, " features"]:
        """The parent of each feature; -1 for parents."""
        return torch.cat([torch.full((self.parents,), -1), torch.arange(self.parents).repeat_interleave(self.children)])

    def draw(self, rows: int, generator: torch.Generator) -> Float[Tensor, "rows features"]:
        """Rows of the distribution."""
        on = torch.rand(rows, self.parents, generator=generator) < self.probability
        beside = on & (torch.rand(rows, self.parents, generator=generator) < self.together)
        which = torch.randint(self.children, (rows, self.parents, 1), generator=generator) == torch.arange(self.children)
        active = torch.cat([on, (beside[:, :, None] & which).flatten(1)], 1)
        return active * (0.5 + 0.5 * torch.rand(active.shape, generator=generator))

    def train(self, seed: int, progress: Callable[[int, int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and the gate's figures."""
        generator = torch.Generator().manual_seed(seed)
        directions = spread_directions(self.features, self.hidden, generator)
        gram, scale, bias = directions.T @ directions, torch.ones(()), torch.full((self.features,), -0.1)
        optimiser = torch.optim.Adam([scale.requires_grad_(), bias.requires_grad_()], lr=self.lr)
        with torch.enable_grad():
            for step in range(self.steps):
                optimiser.param_groups[0]["lr"] = self.lr * (1 - step / self.steps)
                x = self.draw(self.batch, generator)
                optimiser.zero_grad()
                (torch.relu(x @ gram * scale**2 + bias) - x).square().mean().backward()
                optimiser.step()
                if step % 100 == 99:
                    progress(step + 1, self.steps)
        weight, bias = (directions * scale).detach(), bias.detach()
        return {"weight": weight, "bias": bias}, self._figures(weight, bias)

    def _figures(self, weight: Tensor, bias: Tensor) -> dict[str, Any]:
        unit, parent = torch.eye(self.features), self.parent
        together = unit + torch.where(parent[:, None] >= 0, unit[parent.clamp_min(0)], 0.0)
        alone, both = (torch.relu(x @ weight.T @ weight + bias) for x in (unit, together))
        out = torch.cat([alone.diagonal(), both.diagonal(), both[parent >= 0, parent[parent >= 0]]])
        cosines = (weight.T @ weight / weight.norm(dim=0)[0] ** 2).fill_diagonal_(0)
        figures = {"smallest_output": float(out.min()), "largest_cosine": float(cosines.abs().max())}
        return {**figures, "accepted": figures["smallest_output"] > self.gate}

    def build(self, weights: dict[str, Tensor], uri: str, device: str | torch.device) -> TargetModel:
        """The target with these weights, and its truth."""
        target = tms_target(weights["weight"], weights["bias"], uri, False, self.probability, device)
        assert target.toy is not None
        truth = dataclasses.replace(target.toy.truth, parent=self.parent.to(target.device))
        key = f"hierarchy of {self.parents} parents with {self.children} children each, p={self.probability:g}, {self.together:g}"
        target.toy = Toy(self.draw, key, truth)
        return target

    @staticmethod
    def verdict(figures: dict[str, Any]) -> str:
        """What a rejected training came to."""
        return f"puts out a feature as {figures['smallest_output']:.2f} of itself"
