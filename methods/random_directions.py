"""Floor: write vectors are fixed random directions, and only the encoder and the output bias are trained."""

from __future__ import annotations

from typing import Literal

import torch

from decomp_bench.decomposer import Point

from ._dictionary import Dictionary
from ._dictionary_config import DictionaryConfig


class RandomDirectionsConfig(DictionaryConfig):
    """A dictionary's config, and what is imitated."""

    kind: Literal["replacement", "autoencoding"] = "replacement"
    """replacement: reads the MLP's input, as a transcoder; autoencoding: reads its output, as an SAE."""


class RandomDirections(Dictionary):
    """A transcoder or SAE whose decoder is frozen at its random start."""

    name = "random_directions"
    summary = "floor: frozen random decoder, trained encoder"
    Config = RandomDirectionsConfig
    config: RandomDirectionsConfig  # type: ignore[assignment]
    paper = "Heap et al. 2025, Sparse Autoencoders Can Interpret Randomly Initialized Transformers (arXiv:2501.17727)"

    def build(self, generator: torch.Generator) -> None:
        self.kind = self.config.kind  # type: ignore[misc]
        self.tied = self.kind == "autoencoding"  # type: ignore[misc]
        super().build(generator)
        for site in self.sites:
            self.coder(site).W_dec.requires_grad_(False)

    def read(self, layer: int) -> Point:
        return f"{layer}.mlp.{'in' if self.kind == 'replacement' else 'out'}"

    def writes(self, layer: int) -> list[Point]:
        return [f"{layer}.mlp.out"]

    def after_step(self, progress: float) -> None:
        """Nothing to keep: the decoder does not move."""

    @property
    def family(self) -> str:
        return super().family + (" (sees y)" if self.kind == "autoencoding" else "")
