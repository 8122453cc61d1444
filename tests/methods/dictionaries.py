"""Small dictionaries, the batches that they are tried on, and their training on a plain loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from decomp_bench.config import parse
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.registry import method
from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.toy import ResidualMLP

ACTIVATIONS = ["relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "groupmax"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def target(width: int = 12, layers: int = 2) -> TargetModel:
    """An untrained residual MLP: these tests hand the coder its activations directly."""
    maps = {"mlp.up": "blocks.{}.mlp.up", "mlp.down": "blocks.{}.mlp.down"}
    module = ResidualMLP(8, width, 16, layers, generator())
    return TargetModel("toy:none", module, Architecture("blocks.{}", "blocks.{}.mlp", None, maps), layers, width, "regression")


def make(name: str, width: int = 12, layers: tuple[int, ...] = (0, 1), seed: int = 0, **config) -> Decomposer:
    kind = method(name)
    k = 4 if config.get("activation") == "groupmax" else 3  # groups of equal size
    chosen = {"features": 32, "k": k, "batch": 64, "calibration": 1024, **config}
    return kind(parse(kind.Config, chosen, name), target(width, max(layers) + 1), layers, seed)


def batches(width: int = 12, layers: int = 2, rows: int = 64, planted: int = 24, seed: int = 0):
    """Endless batches in which y is another sparse code's image than x, of unequal scale and far from zero mean."""
    g = generator(seed)
    read, write = (F.normalize(torch.randn(layers, planted, width, generator=g), dim=-1) for _ in range(2))
    while True:
        code = torch.rand(rows, planted, generator=g) * (torch.rand(rows, planted, generator=g) < 2 / planted)
        yield Batch(
            clean={f"{m}.mlp.in": 5 * code @ read[m] + 2 for m in range(layers)}
            | {f"{m}.mlp.out": 0.1 * (m + 1) * code @ write[m] - 0.2 for m in range(layers)}
        )


def fit(decomposer: Decomposer, data, steps: int | None = None) -> Decomposer:
    """Training as the harness does it, on a plain loop."""
    config = decomposer.config
    decomposer.train()
    decomposer.before_training(data)
    groups = decomposer.parameter_groups()
    optimiser = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0, fused=True)
    total = config.steps if steps is None else steps
    for step in range(total):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * min(1.0, (total - step) / (0.3 * total))
        sum(decomposer.loss(next(data), step / total).values()).backward()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimiser.step()
        optimiser.zero_grad()
        decomposer.after_step(step / total)
    decomposer.finish(data)
    return decomposer.eval()


def joined(parts) -> dict[str, list[torch.Tensor]]:
    """The activations of several batches, by point."""
    joined: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for key, value in part.clean.items():
            joined.setdefault(key, []).append(value)
    return joined
