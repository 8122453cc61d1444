"""The structure that SAE, transcoder, CLT and random directions share: their coders, what these compute, and what they cost.

A site's coder computes codes = activation(W_enc x + b_enc) and adds codes W_dec to each place that it writes to; a place adds up
its coders and its own bias. Both sides work in normalised coordinates: inputs are centred and scaled by fixed numbers measured
before training, so that E|x|^2 is the width, and so are outputs. Learning rate, thresholds and penalties then mean the same on
every target. Decoder rows have unit length in these coordinates, over all places that a feature writes to together (`_coder.py` says how
free rows come to the same).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.decomposer import Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot, layer_of
from decomp_bench.errors import UserError

from ._coder import ACTIVATIONS, Output, SparseCoder
from ._dictionary_config import DictionaryConfig

if TYPE_CHECKING:
    from ._sharded import Shards


class Coders(Decomposer):
    """A sparse coder for each layer. Subclasses say what a layer's coder reads (`read`) and which places it writes to (`writes`)."""

    Config = DictionaryConfig
    config: DictionaryConfig  # type: ignore[assignment]
    swept = ("k", "threshold")
    on_demand = ("aux",)
    tied: ClassVar[bool] = False
    """Whether encoders start as the decoders' transpose."""
    has_skip: ClassVar[bool] = False
    """Whether there is a linear map from what a layer's coder reads to what that layer writes."""
    shards: Shards | None = None
    """The processes that its components are divided over, if they are (`_sharded.py`)."""
    across_layers: ClassVar[bool] = False
    """Whether one selection is made over all layers together."""

    def read(self, layer: int) -> Point:
        """What a layer's coder reads."""
        raise NotImplementedError

    def writes(self, layer: int) -> list[Point]:
        """Where a layer's coder writes to."""
        raise NotImplementedError

    def build(self, generator: torch.Generator) -> None:
        config, size = self.config, self.target.size
        self.swept = ACTIVATIONS[config.activation].sweeps  # type: ignore[misc]
        self.coders, self.outputs = nn.ModuleDict(), nn.ModuleDict()
        if config.k_by_layer and len(config.k_by_layer) != len(self.layers):
            raise UserError(f"method.k_by_layer names {len(config.k_by_layer)} values for {len(self.layers)} layers; give one for each")
        for place, layer in enumerate(self.layers):
            read, writes = self.read(layer), self.writes(layer)
            slots = tuple(Slot(read, write) for write in writes)
            self.sites.append(Site(str(layer), layer, (read,), slots, config.features))
            own = torch.Generator().manual_seed(generator.initial_seed() * 100_003 + layer)  # whatever layers are trained beside it
            skip = size(writes[0]) if self.has_skip else None
            self.coders[str(layer)] = self.make_coder(config.at_layer(place), size(read), [size(write) for write in writes], own, skip)
            for write in writes:
                if self._key(write) not in self.outputs:
                    self.outputs[self._key(write)] = Output(size(write))

    def make_coder(
        self, config: DictionaryConfig, width: int, outs: list[int], generator: torch.Generator, skip: int | None
    ) -> SparseCoder:
        """A layer's coder, which reads a width and writes to places of these widths."""
        return SparseCoder(config, width, sum(outs), self.tied, generator, skip)

    @staticmethod
    def _key(write: Point) -> str:
        return str(layer_of(write))

    def coder(self, site: Site) -> SparseCoder:
        """The coder of a site."""
        return self.coders[site.name]  # type: ignore[return-value]

    def output(self, write: Point) -> Output:
        """The bias and normaliser of a place that is written to."""
        return self.outputs[self._key(write)]  # type: ignore[return-value]

    def _parts(self, site: Site) -> Iterator[tuple[Slot, slice]]:
        """Each slot of a site with its columns of W_dec."""
        start = 0
        for slot in site.slots:
            width = self.target.size(slot.write)
            yield slot, slice(start, start + width)
            start += width

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        present = [s for s in self.sites if s.reads[0] in inputs and (gates is None or s.name in gates)]
        pre = {site: self.coder(site).pre(self.coder(site).normalise(inputs[site.reads[0]])) for site in present}
        if gates is not None:
            gate = {site: gates[site.name].gate for site in present}
        elif self.training and self.choice == Choice():
            gate = self.training_gates(pre)
        else:
            gate = {site: self.coder(site).activation.gate(value, self.choice) for site, value in pre.items()}
        return {site.name: SiteCodes(self.coder(site).activation.strength(value), gate[site]) for site, value in pre.items()}

    def training_gates(self, pre: dict[Site, Tensor]) -> dict[Site, Tensor]:
        """Ones where components are let through in training, from pre-activations [..., n]."""
        return {site: self.coder(site).activation.training_gate(value) for site, value in pre.items()}

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        total: Tensor | None = None
        for site in self.sites:
            for slot, part in self._parts(site):
                if slot.write == write:
                    term = codes[site.name].value @ self.coder(site).decoder()[:, part]
                    total = term if total is None else total + term
        assert total is not None, f"nothing writes to {write}"
        total = total if self.shards is None else self.shards.sum(total)
        own, site = self._own(write)
        if own.W_skip is not None:
            total = total + F.linear(own.normalise(inputs[site.reads[0]]), own.W_skip)
        return self.output(write).restore(total)

    def _own(self, write: Point) -> tuple[SparseCoder, Site]:
        """The coder and site of the layer that is written to."""
        site = next(site for site in self.sites if site.name == self._key(write))
        return self.coder(site), site

    # ---- accounting

    def component_sizes(self, site: Site) -> int:
        coder = self.coder(site)
        return coder.W_enc.shape[1] + coder.rows.shape[1]

    def constant_size(self, write: Point) -> int:
        skip = self._own(write)[0].W_skip
        return self.output(write).b_dec.numel() + (0 if skip is None else skip.numel())

    def constant_coefficients(self, write: Point) -> int:
        skip = self._own(write)[0].W_skip
        return 0 if skip is None else min(skip.shape)

    def directions(self, site: Site, slot: Slot) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Read and write vectors in the target's own coordinates."""
        folded = self.folded(site)
        return folded["W_enc"], folded["W_dec"][:, dict(self._parts(site))[slot]]

    @torch.no_grad()
    def folded(self, site: Site) -> dict[str, Tensor]:
        """The coder as plain weights: codes = activation(x W_enc^T + b_enc), y = codes W_dec + b_dec.

        Normalisation and the lengths of free decoder rows are folded in. With a skip connection there is `W_skip`, and
        y += x W_skip^T at the site's own layer; gated has `r_mag` and `b_mag`, and `b_enc` is its gates' bias.
        """
        coder = self.coder(site)
        places = [self.output(slot.write) for slot in site.slots]
        scale = torch.cat([place.scale.expand(len(place.mean)) for place in places])
        encoder, bias = coder.W_enc / coder.normalise.scale, coder.b_enc
        if coder.free:
            encoder, bias = encoder * coder.lengths[:, None], bias * coder.lengths
        shift = (encoder.double() @ coder.normalise.mean.double()).to(encoder.dtype)
        plain = {"W_enc": encoder, "b_enc": bias - shift, "W_dec": coder.decoder() * scale}
        plain["b_dec"] = torch.cat([self._folded_skip(slot.write)[1] for slot in site.slots])
        skip = self._folded_skip(site.slots[0].write)[0]
        return plain | coder.activation.folded(shift) | ({} if skip is None else {"W_skip": skip})

    def _folded_skip(self, write: Point) -> tuple[Tensor | None, Tensor]:
        """A place's skip connection and bias in the target's own coordinates."""
        place, own = self.output(write), self._own(write)[0]
        bias = place.mean + place.scale * place.b_dec
        if own.W_skip is None:
            return None, bias
        skip = own.W_skip * (place.scale / own.normalise.scale)
        return skip, bias - skip @ own.normalise.mean

    @property
    def variant(self) -> str:
        if self.config.k_by_layer:
            return f"k={'/'.join(map(str, self.config.k_by_layer))}"
        return ACTIVATIONS[self.config.activation].variant(self.config)

    @property
    def family(self) -> str:
        label = self.name.replace("_", " ") + ("" if self.config.activation == "batchtopk" else f" {self.config.activation}")
        return label + (", skip" if self.has_skip else "") + (", across layers" if self.across_layers else "")

    def sweep(self) -> list[Choice]:
        return self.coder(self.sites[0]).activation.choices()
