"""Cross-layer transcoder: a layer's features write to that MLP's output and to every later one, each with a decoder of its own."""

from __future__ import annotations

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from decomp_bench.decomposer import Point, Site
from decomp_bench.errors import UserError

from ._activations import Code
from ._coder import SparseCoder
from ._dictionary_config import DictionaryConfig, TranscoderConfig
from ._low_rank import LowRankCoder
from ._sparse import Support, top_of_batches
from ._topk import BatchTopK
from .transcoder import Transcoder


class CLTConfig(TranscoderConfig):
    """A transcoder's config, and whether layers share out their active components."""

    younger = (*TranscoderConfig.younger, "decoder_rank")
    across_layers: bool = False
    """Select over all layers at once, k components a row and layer on average, and share one threshold (batchtopk, matryoshka)."""

    decoder_rank: PositiveInt | None = None
    """Rank of the decoders to later layers; the one to a feature's own layer has all directions. None: they have too."""

    @model_validator(mode="after")
    def _selects(self) -> CLTConfig:
        if self.across_layers and self.activation not in ("batchtopk", "matryoshka"):
            raise ValueError(f"across_layers is for batchtopk and matryoshka, not for {self.activation}")
        if self.across_layers and self.train_on != "local":
            raise ValueError("across_layers needs all layers' codes at once, which only train_on=local has")
        if self.across_layers and self.k_by_layer:
            raise ValueError("across_layers shares out one k over all layers; leave k_by_layer out")
        return self


class CrossLayerTranscoder(Transcoder):
    """One coder a layer, with triangular decoders; a layer's output is the sum over the coders at and before it."""

    name = "clt"
    summary = "cross-layer transcoder: features write to every MLP output from their layer on"
    Config = CLTConfig
    config: CLTConfig  # type: ignore[assignment]
    paper = "Ameisen et al. 2025, Circuit Tracing: Revealing Computational Graphs in Language Models"

    def build(self, generator: torch.Generator) -> None:
        self.across_layers = self.config.across_layers  # type: ignore[misc]
        super().build(generator)

    def make_coder(
        self, config: DictionaryConfig, width: int, outs: list[int], generator: torch.Generator, skip: int | None
    ) -> SparseCoder:
        if self.config.decoder_rank is None or len(outs) == 1:
            return super().make_coder(config, width, outs, generator, skip)
        if self.config.decoder_rank > min(outs):
            raise UserError(f"method.decoder_rank={self.config.decoder_rank} exceeds the width {min(outs)} of what is written; lower it")
        return LowRankCoder(config, width, outs, self.config.decoder_rank, generator, skip)

    @property
    def family(self) -> str:
        return super().family + ("" if self.config.decoder_rank is None else f", rank {self.config.decoder_rank}")

    def writes(self, layer: int) -> list[Point]:
        return [f"{later}.mlp.out" for later in self.layers if later >= layer]

    def training_gates(self, pre: dict[Site, Tensor]) -> dict[Site, Tensor]:
        if not self.across_layers or not pre:
            return super().training_gates(pre)
        flat = {site: value.detach().reshape(-1, site.n) for site, value in pre.items()}
        supports = self._selected(flat, None)
        return {site: supports[site].gate().view(value.shape).to(value.dtype) * (value > 0) for site, value in pre.items()}

    def _codes(self, inputs: dict[Site, Tensor], *counts: int | None) -> list[dict[Site, Code]]:
        if not self.across_layers:
            return super()._codes(inputs, *counts)
        with torch.no_grad():
            raw = {site: self.coder(site).raw(x) for site, x in inputs.items()}
            pre = {site: value * self.coder(site).lengths if self.coder(site).free else value for site, value in raw.items()}
            chosen = [self._selected(pre, k) for k in counts]
            pairs = [{site: (support[site].of(raw[site]), support[site]) for site in inputs} for support in chosen]
        return [{site: self.coder(site).code_at(x, *pair[site]) for site, x in inputs.items()} for pair in pairs]

    def _selected(self, pre: dict[Site, Tensor], k: int | None) -> dict[Site, Support]:
        """The largest pre-activations of all layers together."""
        activations: list[BatchTopK] = [self.coder(site).activation for site in pre]  # type: ignore[misc]
        count = (k or activations[0].k) * sum(map(len, pre.values()))
        hint = min(activation.hint for activation in activations)
        return dict(zip(pre, top_of_batches(list(pre.values()), count, hint), strict=True))
