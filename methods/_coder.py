"""A sparse coder's parts: its config, fixed normalisation of what is read and written, and one site's encoder and decoder."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from decomp_bench.config import MethodConfig

from ._activations import ACTIVATIONS, Code
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
        x = x.to("cpu", torch.float64)
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
