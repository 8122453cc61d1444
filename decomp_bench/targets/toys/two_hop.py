"""A task of two hops with planted edges: the first MLP writes variables, the second reads nothing but these variables.

    m_i = |x_i|            written by MLP 0 along a known direction of the residual stream
    y_j = |m_a - m_b|      written by MLP 1, where a, b are the two parents of output j

The residual stream is cut into three subspaces by a fixed random rotation: one that the inputs are embedded in, one that MLP 0 writes to
and MLP 1 reads from, one that MLP 1 writes to. Weights are trained inside these limits, so MLP 1 cannot see the inputs, and the
variables, which the model puts out beside y, lie along known directions. The edges i -> j with i a parent of j are all there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.toy import Block, sparse_features
from decomp_bench.targets.toys.truth import PROBE, Hop, Mechanisms, Toy, Truth, written

STRIDE = 3
"""Output j has the parents j and j + STRIDE (modulo their number): every variable has two children."""


class TwoHopModel(nn.Module):
    """x -> E -> two residual MLPs -> the variables m and the outputs y, from plain weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.embed, self.read = nn.Parameter(weights["embed"].clone()), nn.Parameter(weights["read"].clone())
        neurons, width = weights["in.0"].shape
        self.blocks = nn.ModuleList(Block(width, neurons) for _ in range(2))
        with torch.no_grad():
            for layer, block in enumerate(self.blocks):
                mlp: Any = block.mlp
                for part, name in ((mlp.up, "in"), (mlp.down, "out")):
                    part.weight.copy_(weights[f"{name}.{layer}"])
                    part.bias = None

    def forward(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows outputs"]:
        resid = x @ self.embed
        for block in self.blocks:
            resid = block(resid)
        return resid @ self.read.T


def edges(features: int) -> Bool[Tensor, "features features"]:
    """Which variables (rows) decide which outputs (columns)."""
    each, found = torch.arange(features), torch.zeros(features, features, dtype=torch.bool)
    found[each, each] = found[(each + STRIDE) % features, each] = True
    return found


@dataclass(frozen=True)
class TwoHop:
    """Adam on both outputs' squared errors; accepted where every edge acts and nothing else does.

    An edge's strength is how much of the output a variable alone brings about, against 1; accepted: all edges within `gate` of 1, and
    all other pairs within `gate` of 0.
    """

    features: int = 10
    width: int = 36
    neurons: int = 24
    steps: int = 1500
    batch: int = 512
    probability: float = 0.15
    lr: float = 2e-2
    gate: float = 0.1

    def train(self, seed: int, progress: Callable[[int, int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and the gate's figures."""
        generator = torch.Generator().manual_seed(seed)
        n, h = self.features, self.neurons
        rotation = torch.linalg.qr(torch.randn(self.width, self.width, generator=generator)).Q
        spaces = rotation[: 3 * n].split(n)
        free = [torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in ((h, n), (n, h), (h, n), (n, h))]
        free = [value.requires_grad_() for value in free]
        optimiser = torch.optim.AdamW(free, lr=self.lr, weight_decay=0.0, fused=True)
        child = edges(n)
        with torch.enable_grad():
            for step in range(self.steps):
                optimiser.param_groups[0]["lr"] = self.lr * min(1.0, 2 * (1 - step / self.steps))
                x = sparse_features(self.batch, n, self.probability, generator)
                m, y = self._run(x, free)
                optimiser.zero_grad()
                wanted = x.abs()
                ((m - wanted).square().mean() + (y - (wanted - wanted.roll(-STRIDE, 1)).abs()).square().mean()).backward()
                optimiser.step()
                if step % 100 == 99:
                    progress(step + 1, self.steps)
        free = [value.detach() for value in free]
        weights = {"embed": spaces[0], "read": torch.cat(spaces[1:])}
        for layer in range(2):
            weights |= {f"in.{layer}": free[2 * layer] @ spaces[layer], f"out.{layer}": spaces[layer + 1].T @ free[2 * layer + 1]}
        return weights, self._figures(free, child)

    @staticmethod
    def _run(x: Tensor, free: list[Tensor]) -> tuple[Tensor, Tensor]:
        m = torch.relu(x @ free[0].T) @ free[1].T
        return m, torch.relu(m @ free[2].T) @ free[3].T

    def _figures(self, free: list[Tensor], child: Tensor) -> dict[str, Any]:
        strength = torch.relu(torch.eye(self.features) @ free[2].T) @ free[3].T
        weakest, strongest_other = float(strength[child].min()), float(strength[~child].abs().max())
        accepted = weakest > 1 - self.gate and float(strength[child].max()) < 1 + self.gate and strongest_other < self.gate
        return {"weakest_edge": weakest, "strongest_other": strongest_other, "edges": int(child.sum()), "accepted": accepted}

    def build(self, weights: dict[str, Tensor], uri: str, device: str | torch.device) -> TargetModel:
        """The target with these weights, and its truth."""
        maps = {f"mlp.{name}": f"blocks.{{}}.mlp.{name}" for name in ("up", "down")}
        architecture = Architecture(block="blocks.{}", mlp="blocks.{}.mlp", attn=None, maps=maps)
        target = TargetModel(uri, TwoHopModel(weights), architecture, 2, self.width, "regression", device=device)
        target.toy = Toy(
            lambda rows, generator: sparse_features(rows, self.features, self.probability, generator),
            f"sparse uniform on [-1, 1], {self.features} features, p={self.probability:g}",
            self._truth(target),
        )
        return target

    def _truth(self, target: TargetModel) -> Truth:
        """A mechanism for each input and variable read by a first map, and for each variable and output written by a second one."""
        module: Any = target.module
        spaces = [module.embed, *module.read.split(self.features)]
        unit = torch.eye(self.features, device=target.device)
        mechanisms, live, pattern = written(target, unit, 0), {}, {}
        for layer in range(2):
            up, down = f"{layer}.mlp.up", f"{layer}.mlp.down"
            reads, writes = spaces[layer], spaces[layer + 1]
            mechanisms[up, up] = Mechanisms(reads, reads @ target.weight(up).T)
            mechanisms[down, down] = Mechanisms(writes, writes @ target.weight(down), "write")
            live |= {up: self.features, down: self.features}
            pattern |= {up: "identity"}
        vectors = target.part("1.mlp")(spaces[1])
        mechanisms["1.mlp.in", "1.mlp.out"] = Mechanisms(spaces[1], vectors)
        mechanisms["1.mlp.out", "1.mlp.out"] = Mechanisms(vectors, vectors, None)
        pattern["0.mlp.down"] = "identity"
        hop = Hop(1, spaces[1], edges(self.features).to(target.device), slice(self.features, 2 * self.features))
        return Truth(PROBE * unit, self.probability, mechanisms, live, pattern, hop=hop)

    @staticmethod
    def verdict(figures: dict[str, Any]) -> str:
        """What a rejected training came to."""
        return f"has a weakest edge of {figures['weakest_edge']:.2f} (1 is exact) and a false one of {figures['strongest_other']:.2f}"
