"""Sparse autoencoders on MLP outputs: a component reads from, and writes to, what the MLP writes. It sees the answer as its input."""

from __future__ import annotations

from typing import ClassVar

from decomp_bench.decomposer import Point

from ._dictionary import Dictionary


class SAE(Dictionary):
    """One sparse autoencoder a layer."""

    name = "sae"
    summary = "sparse autoencoder of each MLP's output"
    kind = "autoencoding"
    paper = "Bricken et al. 2023, Towards Monosemanticity; Bussmann et al. 2024, BatchTopK Sparse Autoencoders (arXiv:2412.06410)"
    tied: ClassVar[bool] = True

    def read(self, layer: int) -> Point:
        return f"{layer}.mlp.out"

    def writes(self, layer: int) -> list[Point]:
        return [f"{layer}.mlp.out"]
