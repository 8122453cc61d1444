"""Synthetic activations with known features, by the generator that sae-lens ships: SynthSAEBench (Chanin and Garriga-Alonso 2026,
arXiv 2602.14687). Zipf-frequent features, most of them in trees whose siblings exclude each other, all weakly correlated.

The target computes nothing: its only MLP hands on the activations that it is given, so that a dictionary of what it writes is one of the
synthetic activations. Feature f is the direction that its known component should write along.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.toys.truth import PROBE, Mechanisms, Toy, Truth

BLOCK = 4096
"""Rows that are drawn together."""


class _MLP(nn.Module):
    """Hands on what it reads; its only map is fixed at the identity, so that there is something to replace."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.down.weight.copy_(torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Given(nn.Module):
    """Activations in, the same activations out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(width)])

    def forward(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        return self.blocks[0](x)


@dataclass(frozen=True)
class Synth:
    """The published world (16,384 features in 768 dimensions, 128 trees), or one of its shape that is smaller.

    Nothing is trained; the seed decides directions, trees, correlations and magnitudes. Accepted where the generator gives about as many
    active features a row as their probabilities say, and their directions are nearly orthogonal.
    """

    features: int = 1000
    hidden: int = 128
    trees: int = 8
    correlation_rank: int = 25
    rows: int = 262_144
    apart: int = 1_000_000
    """Added to the seed: of equal seeds, a decomposer that starts from random directions would begin with the features themselves."""

    def train(self, seed: int, progress: Callable[[int, int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The directions, and how many features are active."""
        world = self._world(seed)
        directions = world.feature_dict.feature_vectors.detach().clone()
        with _seeded(0):
            active = (world.activation_generator.sample(BLOCK) > 0).float().sum(1)
        unit = torch.nn.functional.normalize(directions, dim=1)
        largest = float((unit @ unit.T).fill_diagonal_(0).abs().max())
        progress(1, 1)
        figures = {"active": float(active.mean()), "largest_cosine": largest, "features": self.features}
        return {"directions": directions, "seed": torch.tensor(seed)}, {**figures, "accepted": 2 < figures["active"] < self.hidden / 4}

    def build(self, weights: dict[str, Tensor], uri: str, device: str | torch.device) -> TargetModel:
        """The target, its data and its directions."""
        directions, seed = weights["directions"], int(weights["seed"])
        architecture = Architecture("blocks.{}", "blocks.{}.mlp", None, {"mlp.down": "blocks.{}.mlp.down"})
        target = TargetModel(uri, Given(self.hidden), architecture, 1, self.hidden, "regression", device=device)
        world: list[Any] = []

        def draw(rows: int, generator: torch.Generator) -> Float[Tensor, "rows d"]:
            if not world:  # made when data are first wanted: it takes seconds
                world.append(self._world(seed))
            with _seeded(int(torch.randint(2**31, (1,), generator=generator))):
                return world[0].sample(rows)

        vectors = directions.to(target.device)
        written = {("0.mlp.out", "0.mlp.out"): Mechanisms(vectors, vectors, None)}
        key = f"SynthSAEBench world {seed}: {self.features} features in {self.hidden}, {self.trees} trees"
        target.toy = Toy(draw, key, Truth(PROBE * vectors, 0.02, written), self.rows, BLOCK)
        return target

    def _world(self, seed: int) -> Any:
        from sae_lens import synthetic
        from sae_lens.synthetic.synthetic_model import LowRankCorrelationConfig, OrthogonalizationConfig

        config = synthetic.SyntheticModelConfig(
            self.features, self.hidden, seed=self.apart + seed, bias=False,
            firing_probability=synthetic.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
            hierarchy=synthetic.HierarchyConfig(self.trees, 4, 3, mutually_exclusive_portion=1.0, compensate_probabilities=True),
            orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
            correlation=LowRankCorrelationConfig(rank=self.correlation_rank, correlation_scale=0.1),
            mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        )  # fmt: skip
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), torch.enable_grad():  # its progress bar
            return synthetic.SyntheticModel(config)

    @staticmethod
    def verdict(figures: dict[str, Any]) -> str:
        """What a rejected world came to."""
        return f"has {figures['active']:.1f} active features a row"


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generator draws from torch's global state, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
