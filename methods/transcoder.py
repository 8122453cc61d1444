"""Per-layer transcoders: a sparse code of what an MLP reads predicts what it writes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from decomp_bench.config import MethodConfig
from decomp_bench.decomposer import Batch, Codes, Inputs, Point, Site

from ._dictionary import Dictionary
from ._dictionary_config import TranscoderConfig
from ._end_to_end import Places, TrainingCodes, rows_that_count
from ._reconstruction import output_error


class Transcoder(Dictionary):
    """One transcoder a layer, trained to reconstruct each MLP's output, or end to end on the output of the target that they make up."""

    name = "transcoder"
    summary = "sparse code of each MLP's input that predicts its output"
    Config = TranscoderConfig
    config: TranscoderConfig  # type: ignore[assignment]
    paper = (
        "Dunefsky et al. 2024, Transcoders Find Interpretable LLM Feature Circuits (arXiv:2406.11944); with a skip connection: "
        "Paulo et al. 2025, Transcoders Beat Sparse Autoencoders for Interpretability (arXiv:2501.18823)"
    )
    _places: Places | None = None
    """Set on the view of itself with which a training pass runs."""

    def build(self, generator: torch.Generator) -> None:
        self.has_skip = self.config.skip  # type: ignore[misc]
        super().build(generator)

    @classmethod
    def trained_on(cls, config: MethodConfig) -> Literal["activations", "sequences"]:
        return "activations" if getattr(config, "train_on", "local") == "local" else "sequences"

    def read(self, layer: int) -> Point:
        return f"{layer}.mlp.in"

    def writes(self, layer: int) -> list[Point]:
        return [f"{layer}.mlp.out"]

    @property
    def family(self) -> str:
        return super().family + ("" if self.config.train_on == "local" else f", end to end ({self.config.train_on})")

    # ---- end to end

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        if self._places is None:
            return super().encode(inputs, gates)
        codes: Codes = {}
        for site in self.sites:
            if (value := inputs.get(site.reads[0])) is not None:
                x = self._places.gather(self.coder(site).normalise(value))
                empty = x.new_empty(0, site.n)
                codes[site.name] = TrainingCodes(empty, empty, code=self.coder(site).codes(x, None)[0], inputs=x)
        return codes

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        if self._places is None:
            return super().decode(codes, write, inputs)
        terms: list[Tensor] = []
        for site in self.sites:
            for slot, part in self._parts(site):
                if slot.write == write:
                    found = codes[site.name]
                    assert isinstance(found, TrainingCodes)
                    assert found.code is not None
                    terms.append(found.code.decode(self.coder(site).decoder()[:, part].contiguous()))
        own, site = self._own(write)
        if own.W_skip is not None:
            terms.append(codes[site.name].inputs @ own.W_skip.T)  # type: ignore[union-attr]
        return self._places.scatter(self.output(write).restore(torch.stack(terms).sum(0)))

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """End to end: `kl` (of a regression: `mse`) of the output, and the penalties and revival of a local loss."""
        if self.config.train_on == "local":
            return super().loss(batch, progress)
        self._counts(progress)
        error, found = self._passes(batch)
        codes = {site: found[site.name].code for site in self.sites}
        inputs = {site: found[site.name].inputs for site in self.sites}
        constants = self._constants(inputs)  # type: ignore[arg-type]
        wanted = {write: self.output(write)(self._rows(batch, write)) for write in constants}
        with torch.no_grad():
            totals = self._totals(constants, codes)[-1]  # type: ignore[arg-type]
            errors = {write: F.mse_loss(total, wanted[write]) for write, total in totals.items()}
        terms = {"kl" if self.target.is_lm else "mse": error, **self._no_terms()}
        return self._with_the_rest(terms, codes, inputs, constants, wanted, totals, errors, progress)  # type: ignore[arg-type]

    def _passes(self, batch: Batch) -> tuple[Tensor, dict[str, TrainingCodes]]:
        """The output's error, and the codes that led to it; under `single`, its mean over layers."""
        view = copy.copy(self)
        view._places = Places(rows_that_count(batch, self.target.keeps_first))
        single = self.config.train_on == "single"
        errors, codes = [], {}
        for layers in [(layer,) for layer in self.layers] if single else [self.layers]:
            out = view.replaced(batch, layers, self.config.train_on, "self")  # type: ignore[arg-type]
            errors.append(output_error(out.logits, batch, self.target))
            codes |= out.codes
        return torch.stack(errors).mean(), codes

    def _calibration_inputs(self, data: Iterator[Batch]) -> dict[Site, Float[Tensor, "rows d"]]:
        if self.config.train_on != "cascading":
            return super()._calibration_inputs(data)
        parts: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        while sum(map(len, parts[self.sites[0]])) < self.config.calibration:
            codes = self._passes(next(data))[1]
            for site, rows in parts.items():
                rows.append(codes[site.name].inputs)  # type: ignore[arg-type]
        return {site: torch.cat(rows) for site, rows in parts.items()}
