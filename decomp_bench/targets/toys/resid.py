"""Residual MLPs that compute x + relu(x) of many sparse features with fewer neurons (SPD, APD): published sizes.

resid = x W_E; each layer adds W_out relu(W_in resid); y = resid W_E^T. W_E has fixed random unit rows; nothing has a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.toy import Block, sparse_features
from decomp_bench.targets.toys.truth import PROBE, Mechanisms, Toy, Truth, responses, written

BLOCK = 20
"""Steps whose data are drawn together."""


class ResidModel(nn.Module):
    """The network from given W_E [features, width] and, for each layer, W_in [neurons, width] and W_out [width, neurons]."""

    def __init__(self, weights: dict[str, Tensor], layers: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(weights["embed"].clone())
        neurons, width = weights["in.0"].shape
        self.blocks = nn.ModuleList(Block(width, neurons, bias=False) for _ in range(layers))
        with torch.no_grad():
            for layer, block in enumerate(self.blocks):
                block.mlp.up.weight.copy_(weights[f"in.{layer}"])  # type: ignore[union-attr]
                block.mlp.down.weight.copy_(weights[f"out.{layer}"])  # type: ignore[union-attr]

    def forward(self, x: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows features"]:
        resid = x @ self.embed
        for block in self.blocks:
            resid = block(resid)
        return resid @ self.embed.T


@dataclass(frozen=True)
class Resid:
    """The published training: labels x + relu(x), AdamW, learning rate down to zero along a half cosine.

    Accepted where no feature is left out (each alone comes out with at least the share `gate` of its relu) and the loss is below that of
    as many features as there are neurons computed perfectly, one a neuron, and the others not at all: in superposition.
    """

    features: int
    layers: int
    neurons: int
    steps: int
    width: int = 1000
    batch: int = 2048
    probability: float = 0.01
    lr: float = 3e-3
    weight_decay: float = 0.01
    gate: float = 0.25

    def train(self, seed: int, progress: Callable[[int, int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and the gate's figures. Since W_E is fixed, products are taken in the features' coordinates: the same function."""
        generator = torch.Generator().manual_seed(seed)
        weights = self._initial(generator)
        parameters = [value for name, value in weights.items() if name != "embed"]
        optimiser = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)
        gram = weights["embed"] @ weights["embed"].T
        step, losses = 0, list[Tensor]()
        with torch.enable_grad():
            while step < self.steps:
                for x in self._rows(min(BLOCK, self.steps - step), generator):
                    optimiser.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / (self.steps - 1)))
                    error = self._output(x, weights, gram) - x - torch.relu(x)
                    loss = error.square().sum() / (self.batch * self.features)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    losses.append(loss.detach())
                    step += 1
                progress(step, self.steps)
        for parameter in parameters:
            parameter.requires_grad_(False)
        return weights, self._figures(weights, gram, float(torch.stack(losses[-100:]).mean()))

    def _initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        def uniform(*shape: int) -> Tensor:
            return ((2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5).requires_grad_()

        embed = torch.randn(self.features, self.width, generator=generator)
        weights = {"embed": embed / embed.norm(dim=1, keepdim=True)}
        for layer in range(self.layers):
            weights |= {f"in.{layer}": uniform(self.neurons, self.width), f"out.{layer}": uniform(self.width, self.neurons)}
        return weights

    def _rows(self, steps: int, generator: torch.Generator) -> list[Tensor]:
        """The rows with an active feature of the next batches; the others are zero in and out."""
        x = sparse_features(steps * self.batch, self.features, self.probability, generator).unflatten(0, (steps, self.batch))
        return [rows[rows.any(1)] for rows in x]

    def _output(self, x: Tensor, weights: dict[str, Tensor], gram: Tensor) -> Tensor:
        embed, y, hidden = weights["embed"], x @ gram, list[Tensor]()
        for layer in range(self.layers):
            read = weights[f"in.{layer}"]
            pre = x @ (embed @ read.T)
            for earlier, active in enumerate(hidden):
                pre = pre + active @ (read @ weights[f"out.{earlier}"]).T
            hidden.append(torch.relu(pre))
            y = y + hidden[-1] @ (embed @ weights[f"out.{layer}"]).T
        return y

    @torch.no_grad()
    def _figures(self, weights: dict[str, Tensor], gram: Tensor, loss: float) -> dict[str, Any]:
        unit = torch.eye(self.features)
        relu = (self._output(unit, weights, gram) + self._output(-unit, weights, gram)).diagonal()
        computed = int((relu > self.gate).sum())
        naive = (1 - self.layers * self.neurons / self.features) * self.probability / 6  # E[relu(x)^2] = p / 6 for each that is left out
        accepted = computed == self.features and loss < naive
        figures = {"computed": computed, "features": self.features, "smallest_relu": float(relu.min())}
        return {**figures, "loss": loss, "loss_without_superposition": naive, "accepted": accepted}

    def build(self, weights: dict[str, Tensor], uri: str, device: str | torch.device) -> TargetModel:
        """The target with these weights, and its truth."""
        maps = {f"mlp.{name}": f"blocks.{{}}.mlp.{name}" for name in ("up", "down")}
        architecture = Architecture(block="blocks.{}", mlp="blocks.{}.mlp", attn=None, maps=maps)
        target = TargetModel(uri, ResidModel(weights, self.layers), architecture, self.layers, self.width, "regression", device=device)
        target.toy = Toy(
            lambda rows, generator: sparse_features(rows, self.features, self.probability, generator),
            f"sparse uniform on [-1, 1], {self.features} features, p={self.probability:g}",
            self._truth(target),
        )
        return target

    def _truth(self, target: TargetModel) -> Truth:
        """W_in has a mechanism for each feature; W_out is dense: as many live components as neurons."""
        embed: Tensor = target.module.embed  # type: ignore[assignment]
        unit = torch.eye(self.features, device=embed.device)
        mechanisms, live, pattern, read_later = {}, {}, {}, {}
        for layer in range(self.layers):
            up, down = f"{layer}.mlp.up", f"{layer}.mlp.down"
            basis = responses(target, unit, up)
            mechanisms |= {(up, up): Mechanisms(basis, basis @ target.weight(up).T), **written(target, unit, layer)}
            live |= {up: self.features, down: self.neurons}
            pattern |= {up: "identity", down: "dense"}
            read_later[down] = torch.cat([embed, *(target.weight(f"{later}.mlp.up") for later in range(layer + 1, self.layers))])
        return Truth(PROBE * unit, self.probability, mechanisms, live, pattern, readout=embed, read_later=read_later)

    @staticmethod
    def verdict(figures: dict[str, Any]) -> str:
        """What a rejected training came to."""
        loss, naive = figures["loss"], figures["loss_without_superposition"]
        return f"computes {figures['computed']} of {figures['features']} features at loss {loss:.2e} (without superposition {naive:.2e})"
