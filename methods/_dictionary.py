"""The sparse coder that SAE, transcoder, CLT and random directions share.

A site's coder computes codes = activation(W_enc x + b_enc) and adds codes W_dec to each place that it writes to; a place adds up
its coders and its own bias. Both sides work in normalised coordinates: inputs are centred and scaled by fixed numbers measured
before training, so that E|x|^2 is the width, and so are outputs. Learning rate, thresholds and penalties then mean the same on
every target. Decoder rows have unit length in these coordinates, over all places that a feature writes to together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from decomp_bench.config import MethodConfig
from decomp_bench.decomposer import Batch, Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot, layer_of

from ._activations import ACTIVATIONS, Code, StrengthCounts
from ._sparse import encode_at


class DictionaryConfig(MethodConfig):
    """Config of every method that trains a sparse coder. Strengths, thresholds and penalties are in normalised coordinates."""

    lr: Annotated[float, Field(gt=0)] = 3e-2
    """Peak learning rate of Adam. Short runs want it high: a third of it leaves a third more of the variance unexplained."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments; the second is short because a component sees few tokens of a batch."""
    features: PositiveInt = 512
    """Components of each site."""
    activation: Literal["relu", "topk", "batchtopk", "jumprelu"] = "batchtopk"
    k: PositiveInt = 16
    """Active components of a row: exactly (topk) or on average (batchtopk)."""
    l1: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the L1 penalty (relu)."""
    l0: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the L0 penalty (jumprelu)."""
    penalty_warmup: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of training over which l1 and l0 rise from zero."""
    bandwidth: PositiveFloat = 0.5
    """Width of the kernel through which thresholds learn (jumprelu)."""
    threshold_init: PositiveFloat = 0.5
    """Thresholds at the start (jumprelu)."""
    aux: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of the loss that revives dead components: they predict the detached residual (Gao et al. 2024)."""
    aux_k: PositiveInt | None = None
    """Dead components that a row may use for it; None: half the input width."""
    dead_after: PositiveInt = 20_000
    """Tokens without firing after which a component counts as dead."""
    calibration: PositiveInt = 16_384
    """Rows on which normalisation is measured before training, and thresholds are calibrated after it."""

    @model_validator(mode="after")
    def _enough_features(self) -> DictionaryConfig:
        if self.activation in ("topk", "batchtopk") and self.k > self.features:
            raise ValueError(f"k={self.k} exceeds features={self.features}")
        return self


ENCODER_SCALE = 0.25
"""Length of an untied encoder row at the start: random codes say nothing about y, so they start small."""


def unit_rows(rows: int, width: int, generator: torch.Generator) -> Float[Tensor, "rows width"]:
    """Random directions, uniform on the sphere."""
    return F.normalize(torch.randn(rows, width, generator=generator), dim=1)


class Normaliser(nn.Module):
    """Fixed centring and scaling of one point's activations, so that coordinates have mean zero and, on average, variance one."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """To normalised coordinates."""
        return (x - self.mean).mul_(1 / self.scale)

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "rows d"]) -> None:
        """Take mean and scale from data."""
        x = x.double()
        self.mean.copy_(x.mean(0))
        variance = (x - x.mean(0)).square().mean()
        self.scale.copy_(torch.where(variance > 0, variance, 1.0).sqrt())


class Output(Normaliser):
    """One place that is written to: its normaliser, and its bias in normalised coordinates (so it starts at the mean of y)."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.b_dec = nn.Parameter(torch.zeros(width))

    def restore(self, total: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """From summed contributions of coders to the activation."""
        return (total + self.b_dec) * self.scale + self.mean


class SparseCoder(nn.Module):
    """One site's encoder, activation and decoder: W_enc [n, d_in], b_enc [n], W_dec [n, widths of all places written to, joined]."""

    idle: Tensor
    dead: Tensor

    def __init__(self, config: DictionaryConfig, width: int, out: int, tied: bool, generator: torch.Generator) -> None:
        super().__init__()
        n = config.features
        self.normalise = Normaliser(width)
        decoder = unit_rows(n, out, generator)
        encoder = decoder.clone() if tied else ENCODER_SCALE * unit_rows(n, width, generator)
        self.W_enc, self.b_enc, self.W_dec = nn.Parameter(encoder), nn.Parameter(torch.zeros(n)), nn.Parameter(decoder)
        self.activation = ACTIVATIONS[config.activation](config, n)
        self.register_buffer("idle", torch.zeros(n, dtype=torch.long), persistent=False)  # tokens since a component last fired
        self.register_buffer("dead", torch.zeros(n, dtype=torch.bool), persistent=False)
        self._dead_ids: Tensor | None = None

    def pre(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows n"]:
        """Pre-activations of normalised inputs."""
        return F.linear(x, self.W_enc, self.b_enc)

    def code(self, x: Float[Tensor, "rows d"]) -> Code:
        """Codes of normalised inputs as training computes them."""
        with torch.no_grad():
            pre = self.pre(x).float()
            support = self.activation.support(pre)
        if support is None:
            pre = self.pre(x)
            return Code(pre, self.activation.value(pre), None)
        entries = encode_at(x, self.W_enc, self.b_enc, pre, support)
        return Code(entries, self.activation.value(entries, support.col), support)

    @torch.no_grad()
    def watch(self, code: Code) -> Tensor:
        """Count the step for the dead-component counters and running thresholds; returns the mean number of active components."""
        fired = code.fired()
        self.idle.add_(code.rows).mul_(fired == 0)
        self.activation.observe(code.value)
        return fired.sum() / code.rows

    def find_dead(self, after: int) -> None:
        """Note which components have not fired for so many tokens."""
        torch.ge(self.idle, after, out=self.dead)
        self.forget_dead_ids()

    def forget_dead_ids(self) -> None:
        """The dead mask has changed."""
        self._dead_ids = None

    @property
    def dead_ids(self) -> Int[Tensor, " dead"]:
        """Components noted as dead."""
        if self._dead_ids is None:
            self._dead_ids = self.dead.nonzero().squeeze(1)
        return self._dead_ids

    def revival(self, x: Float[Tensor, "rows d"], residual: Float[Tensor, "rows out"], k: int) -> Tensor:
        """Error of the dead components' prediction of the residual, relative to the residual.

        A row uses its k largest dead pre-activations as they are (Gao et al. 2024): most dead components are negative everywhere,
        where a ReLU would let no gradient through. Scaled down where fewer than k are dead.
        """
        ids = self.dead_ids
        pre = F.linear(x, self.W_enc[ids], self.b_enc[ids]).float()
        if len(ids) > k:
            best, index = pre.topk(k, dim=1, sorted=False)
            pre = torch.zeros_like(pre).scatter(1, index, best)
        error = (pre @ self.W_dec[ids] - residual).square().sum()
        return min(1.0, len(ids) / k) * error / residual.square().sum().clamp(min=1e-20)

    @torch.no_grad()
    def to_unit_rows(self) -> None:
        """Give decoder rows unit length, over all places written to together."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))


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
            counts = StrengthCounts(coder.b_enc.device)
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
