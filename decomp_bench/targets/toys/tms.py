"""Toy models of superposition: x_hat = relu(W^T (W x) + b) on sparse features, fewer hidden units than features (SPD, APD).

The MLP of the only layer holds every linear map: `0.mlp.up` is W, `0.mlp.hidden` a fixed identity where there is one, `0.mlp.down`
is W^T with the bias; the final relu follows it. Mechanism f of W is W[:, f] e_f^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.toys.truth import PROBE, Mechanisms, Toy, Truth, written

BETAS, EPS = (0.9, 0.999), 1e-8
BLOCK = 50
"""Steps whose data are drawn together."""
REPRESENTED = 0.5
"""A feature is represented where its column of W is longer than this; trained ones have about 1.1, absent ones 0."""


class _MLP(nn.Module):
    def __init__(self, features: int, hidden: int, identity: bool) -> None:
        super().__init__()
        self.up = nn.Linear(features, hidden, bias=False)
        self.hidden = nn.Linear(hidden, hidden, bias=False) if identity else None
        self.down = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x if self.hidden is None else self.hidden(x))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class TMSModel(nn.Module):
    """The autoencoder from given W [hidden, features] and b [features]."""

    def __init__(self, weight: Float[Tensor, "hidden features"], bias: Float[Tensor, " features"], identity: bool) -> None:
        super().__init__()
        mlp = _MLP(weight.shape[1], weight.shape[0], identity)
        self.blocks = nn.ModuleList([Block(mlp)])
        with torch.no_grad():
            mlp.up.weight.copy_(weight)
            mlp.down.weight.copy_(weight.T)
            mlp.down.bias.copy_(bias)
            if mlp.hidden is not None:
                mlp.hidden.weight.copy_(torch.eye(weight.shape[0]))

    def forward(self, x: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows features"]:
        return torch.relu(self.blocks[0](x))


def sparse_uniform(rows: int, features: int, probability: float, generator: torch.Generator) -> Float[Tensor, "rows features"]:
    """Features that are each active with a probability, uniform on [0, 1] where active."""
    active = torch.rand(rows, features, generator=generator) < probability
    return active * torch.rand(rows, features, generator=generator)


def tms_target(
    weight: Float[Tensor, "hidden features"],
    bias: Float[Tensor, " features"],
    uri: str,
    identity: bool = False,
    probability: float = 0.05,
    device: str | torch.device = "cpu",
) -> TargetModel:
    """A target from given weights, with its truth."""
    features = weight.shape[1]
    maps = {f"mlp.{name}": f"blocks.{{}}.mlp.{name}" for name in ("up", "hidden", "down")}
    architecture = Architecture(block="blocks.{}", mlp="blocks.{}.mlp", attn=None, maps=maps)
    target = TargetModel(uri, TMSModel(weight, bias, identity), architecture, 1, features, "regression", device=device)
    target.toy = Toy(
        lambda rows, generator: sparse_uniform(rows, features, probability, generator),
        f"sparse uniform on [0, 1], {features} features, p={probability:g}",
        tms_truth(target, probability),
    )
    return target


def tms_truth(target: TargetModel, probability: float) -> Truth:
    """Mechanism f of W reads feature f and writes W[:, f]; that of W^T reads W[:, f] and writes feature f; the identity is dense."""
    weight = target.weight("0.mlp.up")
    hidden, features = weight.shape
    unit = torch.eye(features, device=weight.device)
    mechanisms = {
        ("0.mlp.up", "0.mlp.up"): Mechanisms(unit, weight.T),
        ("0.mlp.down", "0.mlp.down"): Mechanisms(unit, weight.T, "write"),
        **written(target, unit, 0),
    }
    live, pattern = {"0.mlp.up": features, "0.mlp.down": features}, {"0.mlp.up": "identity", "0.mlp.down": "identity"}
    if "0.mlp.hidden" in target.map_paths:
        live["0.mlp.hidden"], pattern["0.mlp.hidden"] = hidden, "dense"
    return Truth(PROBE * unit, probability, mechanisms, live, pattern)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TMS:
    """The published training: W tied by shared storage, so that each step applies two AdamW updates to it (one for each of its uses)."""

    features: int
    hidden: int
    batch: int
    bias_zero: bool
    identity: bool = False
    probability: float = 0.05
    steps: int = 10_000
    lr: float = 5e-3
    weight_decay: float = 0.01

    def train(self, seed: int, progress: Callable[[int, int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and the gate's figures. Rows without an active feature are counted and not computed: the same gradients exactly."""
        generator = torch.Generator().manual_seed(seed)
        weight = _uniform(self.hidden, self.features, scale=self.features**-0.5, generator=generator)
        bias = torch.zeros(self.features) if self.bias_zero else _uniform(self.features, scale=self.hidden**-0.5, generator=generator)
        moments = torch.zeros(2, 2 * weight.numel() + bias.numel())
        step = 0
        while step < self.steps:
            for x in self._rows(min(BLOCK, self.steps - step), generator):
                step += 1
                self._update(weight, bias, self._gradient(x, weight, bias), moments, step)
            progress(step, self.steps)
        norms = weight.norm(dim=0)
        figures = {"represented": int((norms > REPRESENTED).sum()), "features": self.features, "smallest_norm": float(norms.min())}
        return {"weight": weight, "bias": bias}, {**figures, "accepted": figures["represented"] == self.features}

    def _rows(self, steps: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The rows with an active feature of the next batches."""
        active = torch.rand(steps, self.batch, self.features, generator=generator) < self.probability
        some = active.any(-1)
        rows = active[some]
        return (rows * torch.rand(rows.shape, generator=generator)).split(some.sum(1).tolist())

    def _gradient(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Gradient of mean((x - x_hat)^2) for W as linear1, W as linear2, and b, joined; rows of zeros are the rest of the batch."""
        hidden = x @ weight.T
        pre = torch.addmm(bias, hidden, weight)
        error = torch.where(pre > 0, pre - x, 0.0)
        first, second = (weight @ error.T) @ x, hidden.T @ error
        own = error.sum(0) + (self.batch - len(x)) * bias.clamp_min(0)
        return torch.cat([first.flatten(), second.flatten(), own]) * (2 / (self.batch * self.features))

    def _update(self, weight: Tensor, bias: Tensor, gradient: Tensor, moments: Tensor, step: int) -> None:
        """One AdamW step on each use of W, both on the same memory, and on b."""
        mean, square = moments
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        move = mean / scale * (self.lr / (1 - BETAS[0] ** step))
        n, kept = weight.numel(), 1 - self.lr * self.weight_decay
        weight.mul_(kept**2).sub_((move[:n] + move[n : 2 * n]).view_as(weight))
        bias.mul_(kept).sub_(move[2 * n :])

    def build(self, weights: dict[str, Tensor], uri: str, device: str | torch.device) -> TargetModel:
        """The target with these weights."""
        return tms_target(weights["weight"], weights["bias"], uri, self.identity, self.probability, device)

    @staticmethod
    def verdict(figures: dict[str, Any]) -> str:
        """What a rejected training came to."""
        return f"represents {figures['represented']} of {figures['features']} features"


def _uniform(*shape: int, scale: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * scale
