"""Attribution-based Parameter Decomposition: a toy's weights as a sum of components, each a low-rank matrix in every decomposed map.

Braun, Bushnaq, Heimersheim, Mendel and Sharkey 2025 (arXiv 2501.14926). A component is on for an input where its first-order effect on
the outputs, by the target's own derivatives, is among the largest; the run with these components alone must give the same outputs, and
they should be of low rank. A component counts once in every map, where its part is switched on with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from decomp_bench.config import MethodConfig
from decomp_bench.decomposer import Batch, Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot, layer_of
from decomp_bench.replacement import clean_reads
from decomp_bench.targets.base import JACOBIAN

from ._apd_stack import StackedAPD, together
from ._calibration import StrengthCounts
from ._gates import key_of

if TYPE_CHECKING:
    from decomp_bench.targets import TargetModel


class APDConfig(MethodConfig):
    """Training settings; the losses are normalised as in the authors' code."""

    components: PositiveInt = 40
    rank: PositiveInt | None = None
    """Rank of a component's part of a map. None: the narrower side of each map, so that any matrix can be written."""
    k: PositiveFloat = 1.0
    """Mean number of components that are on for an input: the k x batch largest attributions of a batch (batch top-k)."""
    faithfulness: NonNegativeFloat = 1.0
    """Weight of the squared difference between the sum of the components and the weights, a mean over weights."""
    recon: NonNegativeFloat = 1.0
    """Weight of the squared error of the output with the chosen components alone, a mean over inputs and outputs."""
    simplicity: NonNegativeFloat = 0.7
    """Weight of the Schatten norm of the chosen components, summed over them and divided by the number of weights."""
    schatten: PositiveFloat = Field(default=1.0, le=2)
    """Its exponent p."""
    activation: NonNegativeFloat = 0.0
    """Weight of the squared error of what the last map of each MLP reads."""
    unit_norm: bool = False
    """Keep the read vectors of components at length one."""
    init_scale: PositiveFloat = 1.0
    """Times the standard deviation of Xavier's initialisation over the stacked components, which is far smaller than that of one matrix."""
    steps: PositiveInt = 10_000
    batch: PositiveInt = 2048
    lr: PositiveFloat = 1e-2
    warmup: int = Field(default=200, ge=0)
    calibration: PositiveInt = 16_384
    """Inputs on which the threshold is set after training: k components exceed it on average."""

    @model_validator(mode="after")
    def _some_are_on(self) -> APDConfig:
        if self.k * self.batch < 1:
            raise ValueError(f"k={self.k:g} of a batch of {self.batch} turns no component on; make k x batch at least 1")
        return self


class APD(Decomposer):
    """See the module. Gates come from the clean pass: an attribution needs the derivative of what follows."""

    name = "apd"
    version: ClassVar[int] = 2  # since then a component has as many coefficients as its rank
    summary = "low-rank components across all maps, chosen by their attribution (toys)"
    Config = APDConfig
    kind = "replacement"
    trains_on = "sequences"
    swept = ("k", "threshold", "delta")
    paper = "Braun et al. 2025, Interpretability in Parameter Space (APD), arXiv:2501.14926"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"components": 12, "steps": 60, "batch": 128, "warmup": 5, "calibration": 512},
        "laptop": {},
        "paper": {"components": 130, "k": 1.28, "steps": 40_000, "batch": 256, "lr": 1e-3, "schedule": "cosine", "warmup": 400,
                  "simplicity": 10.0, "schatten": 0.9, "activation": 1.0, "unit_norm": True, "init_scale": 2.0},  # ResidMLP of one layer
    }  # fmt: skip

    config: APDConfig

    # ---- structure

    def build(self, generator: torch.Generator) -> None:
        config, target = self.config, self.target
        points = [point for layer in self.layers for point in target.maps(layer)]
        sources = tuple(points) + tuple(point + JACOBIAN for point in points)
        self.A, self.B, n = nn.ParameterDict(), nn.ParameterDict(), config.components
        self._own: dict[Point, tuple[Tensor, Tensor | None]] = {}  # taken now: while a pass runs, the maps stand replaced
        for point in points:
            d_out, d_in = target.weight(point).shape
            rank = config.rank or min(d_in, d_out)
            self._own[point] = (target.weight(point), target.bias(point))
            self.A[key_of(point)] = _xavier((n, d_in, rank), config.init_scale, generator)
            self.B[key_of(point)] = _xavier((n, rank, d_out), config.init_scale, generator)
            self.sites.append(Site(point, layer_of(point), sources, (Slot(point, point),), n))
        self.register_buffer("threshold", torch.zeros(()))
        self._statistics: dict[str, Tensor] = {}
        self._read: dict[Point, Tensor] = {}  # what the maps read in the last masked pass of training
        if config.unit_norm:
            for A in self.A.values():
                _normalise(A)
                A.register_hook(lambda g, A=A: g - (g * A).sum(1, keepdim=True) * A.detach())

    threshold: Tensor

    def part(self, point: Point) -> tuple[Float[Tensor, "n d_in m"], Float[Tensor, "n m d_out"]]:
        """The factors of the components' parts of a map."""
        return self.A[key_of(point)], self.B[key_of(point)]

    # ---- codes

    def attributions(self, inputs: Inputs) -> Float[Tensor, "rows n"]:
        """First-order effect of each component on the outputs: sqrt(mean_o (sum_l <df_o / dW_l, P_l>)^2)."""
        effect: Tensor | float = 0.0
        for site in self.sites:
            A, B = self.part(site.name)
            written = torch.einsum("rd,ndm,nme->rne", inputs[site.name], A, B)
            effect = effect + torch.einsum("roe,rne->ron", inputs[site.name + JACOBIAN], written)
        return effect.square().mean(1).sqrt()  # type: ignore[union-attr]

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        reached = [site for site in self.sites if site.name in inputs]
        if gates is not None:
            if self.training:
                self._read |= {site.name: inputs[site.name] for site in reached}
            return {site.name: replace(gates[site.name], strength=torch.ones_like(gates[site.name].gate)) for site in reached}
        if not all(point in inputs for point in self.sites[0].gates_from):
            return {}
        with torch.no_grad():
            on = self._chosen(self.attributions(inputs)).to(inputs[reached[0].name].dtype)
        delta = on.new_ones(len(on)) if self.choice.delta else None
        return {site.name: SiteCodes(torch.ones_like(on), on, delta) for site in reached}

    def _chosen(self, score: Float[Tensor, "rows n"]) -> Bool[Tensor, "rows n"]:
        """Batch top-k in training, which no deployment could run; afterwards a threshold, or k for each input."""
        if self.training:
            best = score.flatten().topk(min(score.numel(), int(self.config.k * len(score)))).indices
            return torch.zeros_like(score, dtype=torch.bool).flatten().index_fill(0, best, True).view_as(score)
        if self.choice.k is not None:
            best = score.topk(min(self.choice.k, score.shape[1])).indices
            return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)
        return score > (self.threshold if self.choice.threshold is None else self.choice.threshold)

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        A, B = self.part(write)
        x, value, (weight, bias) = inputs[write], codes[write].value, self._own[write]
        written = ((x @ A.transpose(0, 1).flatten(1)).unflatten(-1, (len(A), -1)) * value.unsqueeze(-1)).flatten(-2) @ B.flatten(0, 1)
        if (delta := codes[write].delta) is not None:
            written = written + delta.unsqueeze(-1) * (x @ (weight.T - torch.einsum("ndm,nme->de", A, B)))
        return written if bias is None else written + bias

    # ---- training

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        config = self.config
        assert batch.logits is not None
        on = self.encode(clean_reads(self, batch))
        output, size = self.replaced(batch, gates=on).logits, sum(weight.numel() for weight, _ in self._own.values())
        gate = next(iter(on.values())).gate
        terms = {
            "faithfulness": config.faithfulness * self._unfaithful() / size,
            "recon": config.recon * (output - batch.logits).square().mean(),
            "simplicity": config.simplicity * (gate.mean(0) @ self._schatten()) / size,
        }
        if config.activation:
            last = [self.target.maps(layer)[-1] for layer in self.layers]
            errors = torch.stack([(self._read[point] - batch.clean[point]).square().sum(1).mean() for point in last]).sum()
            terms["activation"] = config.activation * errors / sum(self.target.size(point) for point in last)
        self._statistics = {"l0": gate.sum(1).mean()}
        self._read = {}
        return terms

    def _unfaithful(self) -> Float[Tensor, ""]:
        """Squared difference between the sum of the components and the weights, over all maps."""
        with torch.autocast(self.target.device.type, enabled=False):
            pairs = [(torch.einsum("ndm,nme->ed", *self.part(point)), weight) for point, (weight, _) in self._own.items()]
        return torch.stack([(total - weight).square().sum() for total, weight in pairs]).sum()

    def _schatten(self) -> Float[Tensor, " n"]:
        """sum over maps and ranks of (|A_j|^2 |B_j|^2)^(p/2): an upper bound of the Schatten norm, tight for orthogonal factors."""
        parts = [A.square().sum(1) * B.square().sum(2) for A, B in (self.part(site.name) for site in self.sites)]
        return torch.stack([(part + 1e-16).pow(self.config.schatten / 2).sum(1) for part in parts]).sum(0)

    def after_step(self, progress: float) -> None:
        if self.config.unit_norm:
            for A in self.A.values():
                _normalise(A)

    @torch.no_grad()
    def finish(self, data: Iterator[Batch]) -> None:
        counts = StrengthCounts()
        for batch in islice(data, -(-self.config.calibration // self.config.batch)):
            counts.add(self.attributions(clean_reads(self, batch)))
        self.threshold.copy_(counts.thresholds(torch.tensor([self.config.k]))[0])

    def step_statistics(self) -> dict[str, Tensor]:
        return self._statistics

    def stackable(self) -> int:
        return together(self)

    @classmethod
    def stacked(cls, members: Sequence[APD]) -> StackedAPD:  # type: ignore[override]
        return StackedAPD(members)

    # ---- accounting

    def component_sizes(self, site: Site) -> int:
        A, B = self.part(site.name)
        return (A[0].numel() + B[0].numel()) if len(A) else 0

    def component_coefficients(self, site: Site) -> int:
        return self.part(site.name)[0].shape[2]

    def constant_size(self, write: Point) -> int:
        weight, bias = self._own[write]
        return (0 if bias is None else bias.numel()) + (weight.numel() if self.choice.delta else 0)

    def constant_coefficients(self, write: Point) -> int:
        return min(self._own[write][0].shape) if self.choice.delta else 0

    def directions(self, site: Site, slot: Slot) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]] | None:
        A, B = self.part(site.name)
        return (A[..., 0], B[:, 0]) if A.shape[2] == 1 else None

    def matrices(self, site: Site, slot: Slot) -> Float[Tensor, "n d_in d_out"]:
        A, B = self.part(site.name)
        return A @ B

    @property
    def variant(self) -> str:
        return f"k={self.config.k:g}"

    def sweep(self) -> list[Choice]:
        return [Choice(k=k) for k in (1, 2, 4, 8) if k <= self.config.components]

    @classmethod
    def skip(cls, target: TargetModel, layers: tuple[int, ...]) -> str | None:
        if target.is_lm:
            return f"attributions take the derivative of every output, of which {target.uri} has too many: toys only"
        without = [str(layer) for layer in layers if not target.maps(layer)]
        return f"no known linear maps in the MLP of layers {', '.join(without)}" if without else None


def _xavier(shape: tuple[int, int, int], scale: float, generator: torch.Generator) -> nn.Parameter:
    """Xavier's normal initialisation with the fans that torch counts in a stacked tensor, as the authors' code has it."""
    std = (2 / ((shape[0] + shape[1]) * shape[2])) ** 0.5
    return nn.Parameter(torch.randn(shape, generator=generator) * (std * scale))


@torch.no_grad()
def _normalise(A: Tensor) -> None:
    """Give the read vectors A[n, :, m] length one."""
    A.div_(A.norm(dim=1, keepdim=True).clamp_min(1e-12))
