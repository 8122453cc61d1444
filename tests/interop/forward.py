"""Coders written out from their plain weights, random ones, and targets of any width: nothing of the package computes a code here."""

from __future__ import annotations

import torch
from torch import Tensor

from decomp_bench.config import parse
from decomp_bench.registry import method
from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.toy import ResidualMLP

WIDTH, N, K = 6, 10, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def target(width: int = WIDTH, layers: int = 3) -> TargetModel:
    """An untrained residual MLP: activations are handed over directly."""
    maps = {"mlp.up": "blocks.{}.mlp.up", "mlp.down": "blocks.{}.mlp.down"}
    module = ResidualMLP(8, width, 16, layers, generator())
    return TargetModel("toy:none", module, Architecture("blocks.{}", "blocks.{}.mlp", None, maps), layers, width, "regression")


def rows(seed: int = 7, width: int = WIDTH, count: int = 50) -> Tensor:
    return 1.5 * torch.randn(count, width, generator=generator(seed)) + 0.3


def largest(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row that are positive, others zero."""
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def codes(coder, x: Tensor) -> Tensor:
    """Codes of a plain coder."""
    pre = x @ coder.W_enc.T + coder.b_enc
    if coder.activation == "topk":
        return largest(pre, coder.k)
    if coder.activation == "gated":
        return (pre > 0) * (x @ (coder.W_enc * coder.r_mag.exp()[:, None]).T + coder.b_mag).relu()
    return pre.relu() if coder.threshold is None else pre.relu() * (pre > coder.threshold)


def outputs(coders, xs: list[Tensor]) -> list[Tensor]:
    """What coders of successive layers write to each layer's output."""
    written = [coder.b_dec.expand(len(xs[0]), -1) for coder in coders]
    for i, coder in enumerate(coders):
        for j in range(coder.W_dec.shape[1]):
            written[i + j] = written[i + j] + codes(coder, xs[i]) @ coder.W_dec[:, j]
    if coders[0].W_skip is not None:
        written = [y + x @ coder.W_skip.T for y, x, coder in zip(written, xs, coders, strict=True)]
    return written


def ours(name: str, on: TargetModel, layers=(0, 1, 2), n: int = N, seed: int = 0, **config):
    """One of our dictionaries with random weights, far from a trivial normalisation, and its thresholds set."""
    kind = method(name)
    made = kind(parse(kind.Config, {"features": n, "k": K, **config}, name), on, tuple(layers), seed).eval()
    g = generator(seed + 100)
    with torch.no_grad():
        for key, value in made.state_dict().items():
            random = torch.randn(value.shape, generator=g)
            if key.endswith(".scale"):
                value.copy_(random.abs() + 0.5)
            elif key.endswith("table_threshold"):
                value.copy_(torch.linspace(1.5, 0.2, len(value)) + 0.1 * random.abs()[0])
            elif not key.endswith("table_k"):
                value.copy_(0.5 * random)
    return made


def activations(on: TargetModel, layers=(0, 1, 2), seed: int = 3, count: int = 50) -> dict[str, Tensor]:
    """Random rows at both ends of each MLP."""
    return {f"{m}.mlp.{end}": rows(seed + 2 * m + (end == "out"), on.width, count) for m in layers for end in ("in", "out")}


def run(decomposer, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Codes of each layer and what is written to each output, by the decomposer itself."""
    with torch.no_grad():
        found = decomposer.encode(inputs)
        written = [decomposer.decode(found, f"{layer}.mlp.out", inputs) for layer in decomposer.layers]
    return [found[site.name].value for site in decomposer.sites], written


def agree(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Largest difference over the largest entry (at least one) of each tensor, and that there was something to compare."""
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape
        assert other.abs().max() > 0
        assert float((mine - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))
