"""The sparse coder that SAE, transcoder, CLT and random directions share.

A site's coder computes codes = activation(W_enc x + b_enc) and adds codes W_dec to each place that it writes to; a place adds up
its coders and its own bias. Both sides work in normalised coordinates: inputs are centred and scaled by fixed numbers measured
before training, so that E|x|^2 is the width, and so are outputs. Learning rate, thresholds and penalties then mean the same on
every target. Decoder rows have unit length in these coordinates, over all places that a feature writes to together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.decomposer import Batch, Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot, layer_of

from ._activations import ACTIVATIONS, Code, StrengthCounts
from ._coder import DictionaryConfig, Output, SparseCoder


class Dictionary(Decomposer):
    """A sparse coder for each layer. Subclasses say what a layer's coder reads (`read`) and which places it writes to (`writes`)."""

    Config = DictionaryConfig
    config: DictionaryConfig  # type: ignore[assignment]
    swept = ("k", "threshold")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"features": 128, "k": 8, "steps": 60, "batch": 256, "calibration": 4096},
        "laptop": {},
        "paper": {
            "features": 4096,
            "steps": 120_000,
            "batch": 4096,
            "lr": 3e-4,
            "betas": (0.9, 0.999),
            "warmup": 1000,
            "dead_after": 10_000_000,
            "calibration": 131_072,
        },
    }
    tied: ClassVar[bool] = False
    """Whether encoders start as the decoders' transpose."""
    LOOK_EVERY: ClassVar[int] = 10
    """Steps between looks at the dead-component counters; each look waits for the device."""

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
        for layer in self.layers:
            read, writes = self.read(layer), self.writes(layer)
            slots = tuple(Slot(read, write) for write in writes)
            self.sites.append(Site(str(layer), layer, (read,), slots, config.features))
            own = torch.Generator().manual_seed(generator.initial_seed() * 100_003 + layer)  # whatever layers are trained beside it
            self.coders[str(layer)] = SparseCoder(config, size(read), sum(map(size, writes)), self.tied, own)
            for write in writes:
                if self._key(write) not in self.outputs:
                    self.outputs[self._key(write)] = Output(size(write))
        self._losses = 0
        self._statistics: dict[str, Tensor] = {}

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
        codes: Codes = {}
        for site in self.sites:
            read = site.reads[0]
            if read not in inputs or (gates is not None and site.name not in gates):
                continue
            coder = self.coder(site)
            pre = coder.pre(coder.normalise(inputs[read]))
            if gates is not None:
                gate = gates[site.name].gate
            elif self.training and self.choice == Choice():
                gate = coder.activation.training_gate(pre)
            else:
                gate = coder.activation.gate(pre, self.choice)
            codes[site.name] = SiteCodes(coder.activation.strength(pre), gate)
        return codes

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        total: Tensor | None = None
        for site in self.sites:
            for slot, part in self._parts(site):
                if slot.write == write:
                    term = codes[site.name].value @ self.coder(site).W_dec[:, part]
                    total = term if total is None else total + term
        assert total is not None, f"nothing writes to {write}"
        return self.output(write).restore(total)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`recon`: squared error over the variance of y, summed over layers; `sparsity`: the activation's penalty; `aux`: revival."""
        inputs = {site: self.coder(site).normalise(_rows(batch.clean[site.reads[0]])) for site in self.sites}
        codes = {site: self.coder(site).code(inputs[site]) for site in self.sites}
        totals = self._totals(codes)
        wanted = {write: self.output(write)(_rows(batch.clean[write])) for write in totals}
        errors = {write: F.mse_loss(total, wanted[write]) for write, total in totals.items()}
        terms = {"recon": torch.stack(list(errors.values())).sum(), **self._no_terms()}
        warm = min(1.0, progress / self.config.penalty_warmup) if self.config.penalty_warmup else 1.0
        for site, code in codes.items():
            penalty = self.coder(site).activation.penalty(code, self.coder(site).W_dec)
            if penalty is not None:
                terms["sparsity"] = terms["sparsity"] + warm * penalty
            if self.config.aux and len(self.coder(site).dead_ids):
                residual = torch.cat([(wanted[slot.write] - totals[slot.write]).detach() for slot in site.slots], 1)
                revival = self.coder(site).revival(inputs[site], residual, self.config.aux_k or max(1, inputs[site].shape[1] // 2))
                terms["aux"] = terms["aux"] + self.config.aux * revival
        if self.training:
            self._watch(codes, errors)
        return terms

    def _no_terms(self) -> dict[str, Tensor]:
        """Zeros for the terms that not every step has, so that every step names the same ones."""
        names = (["aux"] if self.config.aux else []) + (["sparsity"] if self.config.activation in ("relu", "jumprelu") else [])
        return {name: self.coder(self.sites[0]).b_enc.new_zeros(()) for name in names}

    def _totals(self, codes: dict[Site, Code]) -> dict[Point, Tensor]:
        """What each place receives, its bias included, in normalised coordinates."""
        totals: dict[Point, Tensor] = {}
        for site, code in codes.items():
            widths = [self.target.size(slot.write) for slot in site.slots]
            for slot, term in zip(site.slots, code.decode(self.coder(site).W_dec).split(widths, 1), strict=True):
                totals[slot.write] = term + totals.get(slot.write, self.output(slot.write).b_dec)
        return totals

    def _watch(self, codes: dict[Site, Code], errors: dict[Point, Tensor]) -> None:
        l0 = [self.coder(site).watch(code) for site, code in codes.items()]
        self._losses += 1
        if self._losses % self.LOOK_EVERY == 0:
            for site in codes:
                self.coder(site).find_dead(self.config.dead_after)
        with torch.no_grad():
            dead = torch.stack([self.coder(site).dead.float().mean() for site in codes])
            fvu = torch.stack(list(errors.values())).mean()
            self._statistics = {"l0": torch.stack(l0).mean(), "dead": dead.mean(), "fvu": fvu}

    def step_statistics(self) -> dict[str, Tensor]:
        return self._statistics

    # ---- accounting

    def component_sizes(self, site: Site) -> int:
        coder = self.coder(site)
        return coder.W_enc.shape[1] + coder.W_dec.shape[1]

    def constant_size(self, write: Point) -> int:
        return self.output(write).b_dec.numel()

    def directions(self, site: Site, slot: Slot) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Read and write vectors in the target's own coordinates."""
        folded = self.folded(site)
        return folded["W_enc"], folded["W_dec"][:, dict(self._parts(site))[slot]]

    @torch.no_grad()
    def folded(self, site: Site) -> dict[str, Tensor]:
        """The coder as plain weights, normalisation folded in: codes = activation(x W_enc^T + b_enc), y = codes W_dec + b_dec."""
        coder = self.coder(site)
        places = [self.output(slot.write) for slot in site.slots]
        scale = torch.cat([place.scale.expand(len(place.mean)) for place in places])
        encoder = coder.W_enc / coder.normalise.scale
        bias = torch.cat([place.mean + place.scale * place.b_dec for place in places])
        shift = (encoder.double() @ coder.normalise.mean.double()).to(encoder.dtype)
        return {"W_enc": encoder, "b_enc": coder.b_enc - shift, "W_dec": coder.W_dec * scale, "b_dec": bias}

    @property
    def variant(self) -> str:
        return ACTIVATIONS[self.config.activation].variant(self.config)

    @property
    def family(self) -> str:
        label = self.name.replace("_", " ")
        return label if self.config.activation == "batchtopk" else f"{label} {self.config.activation}"

    def sweep(self) -> list[Choice]:
        return self.coder(self.sites[0]).activation.choices()

    # ---- training

    def before_training(self, data: Iterator[Batch]) -> None:
        """Measure the normalisation of every point that is read or written."""
        rows = self._take(data)
        for site in self.sites:
            self.coder(site).normalise.measure(rows[site.reads[0]])
            for slot in site.slots:
                self.output(slot.write).measure(rows[slot.write])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for each coder and each output bias, so that clipping does not couple layers."""
        groups = [[p for p in module.parameters() if p.requires_grad] for module in (*self.coders.values(), *self.outputs.values())]
        return [{"params": params, "betas": self.config.betas} for params in groups if params]

    def after_step(self, progress: float) -> None:
        """Bring decoder rows back to unit length."""
        for site in self.sites:
            self.coder(site).to_unit_rows()

    @torch.no_grad()
    def finish(self, data: Iterator[Batch]) -> None:
        """Calibrate thresholds on training activations."""
        if self.config.activation != "batchtopk":
            return
        rows = self._take(data)
        for site in self.sites:
            coder = self.coder(site)
            counts = StrengthCounts()
            for part in rows[site.reads[0]].split(4096):
                counts.add(coder.pre(coder.normalise(part)))
            coder.activation.calibrate(counts)  # type: ignore[operator]

    def _take(self, data: Iterator[Batch]) -> dict[Point, Float[Tensor, "rows d"]]:
        """Activation rows at every point for measuring and calibrating."""
        taken: dict[Point, list[Tensor]] = {point: [] for point in sorted(self.points())}
        count = 0
        while count < self.config.calibration:
            batch = next(data)
            for point, parts in taken.items():
                parts.append(_rows(batch.clean[point]))
            count += len(parts[-1])
        return {point: torch.cat(parts) for point, parts in taken.items()}

    def train_state(self) -> dict[str, Tensor]:
        state = {"losses": torch.tensor(self._losses)}
        for site in self.sites:
            coder = self.coder(site)
            state |= {f"{site.name}.idle": coder.idle, f"{site.name}.dead": coder.dead}
        return state

    def load_train_state(self, state: dict[str, Tensor]) -> None:
        self._losses = int(state["losses"])
        for site in self.sites:
            coder = self.coder(site)
            coder.idle.copy_(state[f"{site.name}.idle"])
            coder.dead.copy_(state[f"{site.name}.dead"])
            coder.forget_dead_ids()


def _rows(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "n d"]:
    return x.reshape(-1, x.shape[-1])
