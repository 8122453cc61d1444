"""Cross-layer transcoder: a layer's features write to that MLP's output and to every later one, each with a decoder of its own."""

from __future__ import annotations

from decomp_bench.decomposer import Point

from ._dictionary import Dictionary


class CrossLayerTranscoder(Dictionary):
    """One coder a layer, with triangular decoders; a layer's output is the sum over the coders at and before it."""

    name = "clt"
    summary = "cross-layer transcoder: features write to every MLP output from their layer on"
    paper = "Ameisen et al. 2025, Circuit Tracing: Revealing Computational Graphs in Language Models"

    def read(self, layer: int) -> Point:
        return f"{layer}.mlp.in"

    def writes(self, layer: int) -> list[Point]:
        return [f"{later}.mlp.out" for later in self.layers if later >= layer]
