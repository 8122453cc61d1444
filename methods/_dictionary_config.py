"""Config of every method that trains a sparse coder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from decomp_bench.config import MethodConfig

PENALTIES: dict[str, tuple[str, ...]] = {"relu": ("l1", "tanh"), "gated": ("l1",), "jumprelu": ("l0", "target_l0", "tanh")}
"""The sparsity penalties of each activation that has one; the first is its own."""
SELECTING = ("topk", "batchtopk", "matryoshka")
"""Activations that select a number of components, which may differ from step to step."""


class DictionaryConfig(MethodConfig):
    """Config of every method that trains a sparse coder. Strengths, thresholds and penalties are in normalised coordinates."""

    lr: Annotated[float, Field(gt=0)] = 3e-2
    """Peak learning rate of Adam. Short runs want it high: a third of it leaves a third more of the variance unexplained."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments; the second is short because a component sees few tokens of a batch."""
    younger = ("k_by_layer", "stochastic", "gate_decoder")
    features: PositiveInt = 512
    """Components of each site."""
    activation: Literal["relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "groupmax"] = "batchtopk"
    """Which components are let through: relu, jumprelu and gated by their own strength under a penalty, the others by rank."""
    decoder_rows: Literal["unit", "free"] = "unit"
    """unit: write vectors are kept at length one; free: they have any length, and strengths are multiplied by it instead."""
    k: PositiveInt = 16
    """Active components of a row: exactly (topk), on average (batchtopk, matryoshka), or at most, one of each group (groupmax)."""
    k_by_layer: tuple[PositiveInt, ...] | None = None
    """Each decomposed layer's own k, in their order; None: k for all of them."""
    k_start: PositiveInt | None = None
    """Active components at the start, from which k is approached in a straight line (topk, batchtopk, matryoshka); None: k."""
    k_anneal: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of training over which it is."""
    multi_k: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a second reconstruction with 4k components (topk, batchtopk, matryoshka; Gao et al. 2024 use 1/8); 0: none."""
    prefixes: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
    """Shares of the components, counted from the first, that must reconstruct y without the rest (matryoshka), rising."""
    penalty: Literal["l1", "l0", "target_l0", "tanh"] | None = None
    """Sparsity penalty. None: l1 for relu and gated, l0 for jumprelu. relu and jumprelu also take tanh, jumprelu also target_l0."""
    l1: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the L1 penalty: the sum of strengths, each times the length of its write vector."""
    gate_decoder: Literal["trained", "frozen"] = "trained"
    """Whether the decoder learns from what the gates alone reconstruct, as in sae-lens, or not, as in the paper (gated)."""
    l0: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the L0 penalties: the number of active components (l0), or 2 / target * (that number - target)^2 (target_l0)."""
    target_l0: PositiveFloat = 16.0
    """Active components of a row that the penalty target_l0 aims at."""
    tanh: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the tanh penalty: the sum of tanh(tanh_scale * strength * length of the write vector) (Ameisen et al. 2025)."""
    tanh_scale: PositiveFloat = 4.0
    """How fast it saturates."""
    penalty_warmup: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of training over which the penalty's weight rises from zero."""
    bandwidth: PositiveFloat = 0.5
    """Width of the kernel through which thresholds learn (jumprelu)."""
    threshold_init: PositiveFloat = 0.5
    """Thresholds at the start (jumprelu)."""
    ste_to_input: bool = False
    """Send the thresholds' pseudo-gradient to the pre-activations too, with the opposite sign (jumprelu; Anthropic, January 2025)."""
    stochastic: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a second reconstruction in which inactive components are let through too, each with a random share of its strength,
    uniform from 0 to 1 (SPD's stochastic reconstruction; Bushnaq, Braun, Sharkey 2025); 0: none. It takes dense products."""
    revive: Literal["aux", "resample", "pre_act", "none"] = "aux"
    """What brings dead components back. aux: they predict the residual (Gao et al. 2024). resample: they start again at badly
    reconstructed rows (Bricken et al. 2023). pre_act: a penalty on how far they are below their threshold (jumprelu; Anthropic 2025)."""
    aux: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of the aux loss."""
    aux_k: PositiveInt | None = None
    """Dead components that a row may use for it; None: half the input width."""
    resample_every: PositiveInt = 100
    """Steps between resamplings; none once the learning rate decays, which would leave a new component no time."""
    pre_act: Annotated[float, Field(ge=0)] = 3e-3
    """Weight of the pre-activation penalty."""
    dead_after: PositiveInt = 20_000
    """Tokens without firing after which a component counts as dead."""
    calibration: PositiveInt = 16_384
    """Rows on which normalisation is measured before training, and thresholds are calibrated after it."""

    @model_validator(mode="after")
    def _fits(self) -> DictionaryConfig:
        ranks = (*SELECTING, "groupmax")
        ks = self.k_by_layer or (self.k,)
        for key, value in (*(("k", k) for k in ks), ("k_start", self.k_start or 0)):
            if self.activation in ranks and value > self.features:
                raise ValueError(f"{key}={value} exceeds features={self.features}")
        for k in ks:
            if self.activation == "groupmax" and self.features % k:
                raise ValueError(f"groupmax needs groups of equal size: features={self.features} is no multiple of k={k}")
        if self.k_by_layer and (self.activation not in ranks or self.multi_k):
            raise ValueError(f"k_by_layer is for {', '.join(ranks)}, without multi_k")
        if self.activation not in SELECTING and (self.k_start or self.multi_k):
            raise ValueError(f"k_start and multi_k are for {', '.join(SELECTING)}, not for {self.activation}")
        if self.penalty is not None and self.penalty not in PENALTIES.get(self.activation, ()):
            known = ", ".join(PENALTIES.get(self.activation, ())) or "none"
            raise ValueError(f"{self.activation} has no penalty '{self.penalty}'; it has: {known}")
        if self.activation == "gated" and self.decoder_rows == "free":
            raise ValueError("gated has unit decoder rows: its strength is free already")
        if self.revive == "pre_act" and self.activation != "jumprelu":
            raise ValueError("revive=pre_act is for jumprelu, which alone has thresholds; use aux or resample")
        if self.activation == "matryoshka" and list(self.prefixes) != sorted(set(self.prefixes)):
            raise ValueError("prefixes must rise")
        return self

    @property
    def sparsity(self) -> str | None:
        """The penalty in use, if any."""
        own = PENALTIES.get(self.activation)
        return None if own is None else self.penalty or own[0]

    def at_layer(self, place: int) -> DictionaryConfig:
        """The config of the decomposed layer at a place in their order, whose k is its own."""
        return self if self.k_by_layer is None else self.model_copy(update={"k": self.k_by_layer[place], "k_by_layer": None})

    def k_at(self, progress: float) -> int:
        """Active components at a point of training, which runs from 0 to 1."""
        if self.k_start is None or progress >= self.k_anneal:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * progress / self.k_anneal)

    def widths(self) -> list[int]:
        """How many components each prefix holds, all of them last (matryoshka)."""
        inner = {max(1, round(share * self.features)) for share in self.prefixes}
        return [*sorted(inner - {self.features}), self.features]


class TranscoderConfig(DictionaryConfig):
    """A dictionary's config, and what only a map from an MLP's input to its output can have."""

    skip: bool = False
    """Add a trained linear map from an MLP's input to its output, always on (Paulo et al. 2025)."""
    train_on: Literal["local", "cascading", "clean", "single"] = "local"
    """local: reconstruct each MLP's output. Else end to end: the KL divergence of the target's output with all MLPs replaced, reading
    the replaced stream (cascading) or clean activations (clean), or averaged over replacing one at a time (single). Then a batch holds
    sequences, `batch` is 8 and `lr` 3e-3 unless given."""

    @model_validator(mode="before")
    @classmethod
    def _end_to_end_defaults(cls, data: Any) -> Any:
        end_to_end = isinstance(data, dict) and data.get("train_on", "local") != "local"
        return {"batch": 8, "lr": 3e-3, **data} if end_to_end else data

    @model_validator(mode="after")
    def _has_one_output(self) -> TranscoderConfig:
        if self.train_on != "local" and (self.activation == "matryoshka" or self.multi_k or self.stochastic):
            raise ValueError(f"train_on={self.train_on} has one output to compare: it takes neither matryoshka nor multi_k nor stochastic")
        return self


PAPER: dict[str, Any] = {
    "features": 4096,
    "steps": 120_000,
    "batch": 4096,
    "lr": 3e-4,
    "betas": (0.9, 0.999),
    "warmup": 1000,
    "dead_after": 10_000_000,
    "calibration": 131_072,
    "resample_every": 25_000,
}
"""Published sizes: half a billion tokens, four thousand components a site."""
