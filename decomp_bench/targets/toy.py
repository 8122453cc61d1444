"""Toy targets by name: two small residual MLPs that are trained in a second, here, and those with a known truth, in `toys`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.errors import UserError
from decomp_bench.targets.base import TOY_STREAM, Architecture, TargetModel
from decomp_bench.targets.toys import TOYS as KNOWN

# name -> (features, residual width, neurons a layer, layers, probability that a feature is active, training steps)
TOYS = {"resid_mlp1": (20, 12, 10, 1, 0.1, 600), "resid_mlp2": (20, 12, 6, 2, 0.1, 600)}


class _MLP(nn.Module):
    def __init__(self, width: int, neurons: int, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, neurons, bias=bias), nn.Linear(neurons, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """resid + MLP(resid), with ReLU."""

    def __init__(self, width: int, neurons: int, bias: bool = True) -> None:
        super().__init__()
        self.mlp = _MLP(width, neurons, bias)

    def forward(self, resid: Tensor) -> Tensor:
        return resid + self.mlp(resid)


class ResidualMLP(nn.Module):
    """x -> W_E -> residual MLP blocks -> W_E^T, trained to y = x + relu(x) on sparse features (specification: SPD, ResidMLP)."""

    def __init__(self, features: int, width: int, neurons: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        embed = torch.randn(features, width, generator=generator)
        self.embed = nn.Parameter(embed / embed.norm(dim=1, keepdim=True), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, neurons) for _ in range(layers))
        for parameter in self.blocks.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 1
            scale = fan_in**-0.5 if parameter.dim() == 2 else 0.0
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale

    def forward(self, x: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows features"]:
        resid = x @ self.embed
        for block in self.blocks:
            resid = block(resid)
        return resid @ self.embed.T


def sparse_features(rows: int, features: int, probability: float, generator: torch.Generator) -> Float[Tensor, "rows features"]:
    """Features that are each active with a probability, uniform on [-1, 1] where active."""
    active = torch.rand(rows, features, generator=generator) < probability
    return active * (2 * torch.rand(rows, features, generator=generator) - 1)


def named(name: str) -> tuple[str, int | None]:
    """Kind and seed of `NAME@SEED`; raises UserError for anything else, an unknown kind among it."""
    kind, _, seed = name.partition("@")
    if kind not in (*TOYS, *KNOWN) or (seed and not seed.isdigit()):
        raise UserError(f"unknown toy '{name}'; known: {', '.join(f'toy:{toy}' for toy in (*TOYS, *KNOWN))}, with @SEED if wanted")
    return kind, int(seed) if seed else None


def load_toy(name: str, uri: str, device: str | torch.device) -> TargetModel:
    """A toy target by its name `NAME@SEED`; the same name gives the same weights.

    Raises UserError for an unknown name, and for a seed whose training did not reach the published solution.
    """
    kind, seed = named(name)
    if kind in KNOWN:
        from decomp_bench.targets.toys.library import load_known

        return load_known(kind, seed, uri, device)
    features, width, neurons, layers, probability, steps = TOYS[kind]
    generator = torch.Generator().manual_seed(seed or 0)
    model = ResidualMLP(features, width, neurons, layers, generator)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)
    with torch.enable_grad():
        for _ in range(steps):
            x = sparse_features(512, features, probability, generator)
            loss = (model(x) - x - torch.relu(x)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    architecture = Architecture(
        block="blocks.{}", mlp="blocks.{}.mlp", attn=None, maps={"mlp.up": "blocks.{}.mlp.up", "mlp.down": "blocks.{}.mlp.down"}
    )
    about = {"features": features, "probability": probability, "loss": float(loss.detach())}
    target = TargetModel(uri, model, architecture, layers, width, "regression", device=device, about=about)
    target.apart = TOY_STREAM
    return target
