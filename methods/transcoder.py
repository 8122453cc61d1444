"""Per-layer transcoders: a sparse code of what an MLP reads predicts what it writes."""

from __future__ import annotations

from decomp_bench.decomposer import Point

from ._dictionary import Dictionary


class Transcoder(Dictionary):
    """One transcoder a layer."""

    name = "transcoder"
    summary = "sparse code of each MLP's input that predicts its output"
    paper = "Dunefsky et al. 2024, Transcoders Find Interpretable LLM Feature Circuits (arXiv:2406.11944)"

    def read(self, layer: int) -> Point:
        return f"{layer}.mlp.in"

    def writes(self, layer: int) -> list[Point]:
        return [f"{layer}.mlp.out"]
