"""Per-layer transcoders: a sparse code of what an MLP reads predicts what it writes."""

from __future__ import annotations

import torch

from decomp_bench.decomposer import Point

from ._dictionary import Dictionary
from ._dictionary_config import TranscoderConfig


class Transcoder(Dictionary):
    """One transcoder a layer."""

    name = "transcoder"
    summary = "sparse code of each MLP's input that predicts its output"
    Config = TranscoderConfig
    config: TranscoderConfig  # type: ignore[assignment]
    paper = (
        "Dunefsky et al. 2024, Transcoders Find Interpretable LLM Feature Circuits (arXiv:2406.11944); with a skip connection: "
        "Paulo et al. 2025, Transcoders Beat Sparse Autoencoders for Interpretability (arXiv:2501.18823)"
    )

    def build(self, generator: torch.Generator) -> None:
        self.has_skip = self.config.skip  # type: ignore[misc]
        super().build(generator)

    def read(self, layer: int) -> Point:
        return f"{layer}.mlp.in"

    def writes(self, layer: int) -> list[Point]:
        return [f"{layer}.mlp.out"]
