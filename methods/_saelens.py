"""Training SAEs of sae-lens: their config behind ours, their seeded construction, and what their trainer keeps beside the weights.

sae-lens takes seconds to import, so every import of it is inside a function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from decomp_bench.config import MethodConfig

from ._activations import BatchTopK, TopK
from ._coder import DictionaryConfig

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE

TOPK_LIKE = ("topk", "batchtopk", "matryoshka_batchtopk")
BATCH_LIKE = ("batchtopk", "matryoshka_batchtopk")
OWN_NAMES = {"d_sae": "features", "k": "k", "l1_coefficient": "l1", "l0_coefficient": "l0"}
"""Names of theirs that have a key of their own here."""
FIXED = ("d_in", "dtype", "device", "reshape_activations", "metadata", "use_sparse_activations")
"""Names of theirs that the target, the layer and the harness decide."""
ROW_NORMS = {"constant_norm_rescale": 1, "layer_norm": 2}
"""Normalisations that measure each row anew, and how many numbers of a row they pass around the dictionary."""


class SaeLensConfig(MethodConfig):
    """Config of a training SAE of sae-lens. Numbers are in its units: activations as they are, squared errors summed over the width.

    The optimiser's defaults are those of its SAETrainerConfig: Adam without weight decay, betas, constant rate, no warm-up, each SAE's
    gradient clipped at norm 1. What differs: the default batch and steps are the harness's; activation rows are rounded to bf16, and the
    first position of a text is left out; a warm-up of w steps starts at 1/(w+1) of the rate instead of 1/w; the decay begins at
    `decay_from` and ends at `lr_end` (their `lr_decay_steps` is schedule=linear here), and there are no warm restarts.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    architecture: Literal["standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"] = "batchtopk"
    features: PositiveInt = 512
    """Components of each layer (their d_sae)."""
    k: PositiveFloat = 16.0
    """Active components of a row: exactly (topk) or on average (batchtopk, matryoshka_batchtopk; a fraction is allowed there)."""
    l1: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the L1 penalty (standard, gated)."""
    l0: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the L0 penalty (jumprelu)."""
    dead_feature_window: PositiveInt = 1000
    """Steps without firing after which a component counts as dead."""
    recalibrate: bool = True
    """Set the threshold of batchtopk and matryoshka_batchtopk from training activations after the last step. Theirs, a moving average
    that starts at 0, lets many times k through after a short training; False keeps it."""
    calibration: PositiveInt = 16_384
    """Rows for that."""
    norm_batches: PositiveInt = 16
    """Batches from which normalize_activations=expected_average_only_in and covariance_whitening are estimated (theirs: 1000)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Anything else of their training config by its own name, such as normalize_activations, apply_b_dec_to_input, l1_warm_up_steps,
    aux_loss_coefficient, jumprelu_bandwidth, matryoshka_widths (default: an eighth, a quarter, a half and all of the features)."""

    @field_validator("options")
    @classmethod
    def _options_fit(cls, options: dict[str, Any], info: Any) -> dict[str, Any]:
        if {"architecture", "features", "k", "l1", "l0"} <= info.data.keys():
            checked = _checked(info.data["architecture"], options)
            training_sae(cls.model_construct(**{**info.data, "options": checked}), 1, 0, device="meta")
            return checked
        return options

    @model_validator(mode="after")
    def _possible_k(self) -> SaeLensConfig:
        if self.architecture in TOPK_LIKE and self.k > self.features:
            raise ValueError(f"k={self.k:g} exceeds features={self.features}")
        if self.architecture == "topk" and self.k != int(self.k):
            raise ValueError(f"k={self.k:g} must be a whole number for topk; batchtopk takes fractions")
        return self


def _checked(architecture: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options as the types that sae-lens declares; raises ValueError for one that it does not have, or that does not fit."""
    from sae_lens.registry import get_sae_training_class

    kind = get_sae_training_class(architecture)[1]
    hints, names = typing.get_type_hints(kind), [f.name for f in dataclasses.fields(kind)]
    known = sorted({*names} - {*OWN_NAMES, *FIXED})
    checked = {}
    for name, value in options.items():
        if name in OWN_NAMES and name in names:
            raise ValueError(f"'{name}' is set as method.{OWN_NAMES[name]}")
        if name not in known:
            raise ValueError(f"{architecture} of sae-lens has no option '{name}' to set; it has: {', '.join(known)}")
        if name == "normalize_activations":  # its declared type lacks a value that it accepts; it checks the value itself
            checked[name] = value
            continue
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"'{name}': {error.errors()[0]['msg']}") from None
    normalisation = options.get("normalize_activations")
    if architecture in TOPK_LIKE and normalisation in ROW_NORMS:
        raise ValueError(f"the loss of {architecture} in sae-lens does not support normalize_activations={normalisation}")
    return checked


def training_sae(config: SaeLensConfig, width: int, seed: int, about: dict[str, Any] | None = None, device: str = "cpu") -> TrainingSAE:
    """An initialised training SAE; the same seed gives the same weights, and the global generator is left as it was."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    cls, config_cls = get_sae_training_class(config.architecture)
    theirs = {"d_in": width, "d_sae": config.features, "device": device, "metadata": SAEMetadata(**(about or {}))}
    theirs |= {"k": int(config.k) if config.architecture == "topk" else config.k}
    theirs |= {"l1_coefficient": config.l1, "l0_coefficient": config.l0}
    if config.architecture == "matryoshka_batchtopk":
        theirs["matryoshka_widths"] = sorted({max(1, config.features // part) for part in (8, 4, 2, 1)})
    theirs |= {name: list(value) if isinstance(value, list) else value for name, value in config.options.items()}
    names = {f.name for f in dataclasses.fields(config_cls)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return cls(config_cls(**{name: value for name, value in theirs.items() if name in names}))


class Scaling(nn.Module):
    """The fixed map that sae-lens puts before an SAE for expected_average_only_in and covariance_whitening; the identity otherwise.

    Their trainer folds it into the weights at the end; here it stays beside them, and only an export is folded.
    """

    def __init__(self, mode: str, width: int) -> None:
        super().__init__()
        self.mode = mode
        if mode == "expected_average_only_in":
            self.register_buffer("factor", torch.ones((), dtype=torch.float64))
        elif mode == "covariance_whitening":
            self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
            self.register_buffer("matrix", torch.eye(width, dtype=torch.float64))
            self.register_buffer("inverse_matrix", torch.eye(width, dtype=torch.float64))

    def scaler(self) -> Any:
        """The same map as an object of theirs."""
        from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

        if self.mode == "expected_average_only_in":
            return ActivationScaler(scaling_factor=float(self.factor))  # type: ignore[arg-type]
        if self.mode == "covariance_whitening":
            return ActivationScaler(whitening=ActivationWhitening(self.mean, self.matrix, self.inverse_matrix))  # type: ignore[arg-type]
        return ActivationScaler()

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """To the coordinates that the SAE works in."""
        return self.scaler().scale(x)

    def undo(self, y: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Back to the target's own."""
        return self.scaler().unscale(y)

    def estimate(self, rows: Iterator[Tensor], width: int, batches: int) -> None:
        """Measure the map on batches of rows, as their trainer does before the first step."""
        scaler = self.scaler()
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            if self.mode == "expected_average_only_in":
                scaler.estimate_scaling_factor(width, rows, batches)
                self.factor.fill_(scaler.scaling_factor)  # type: ignore[operator]
            elif self.mode == "covariance_whitening":
                scaler.estimate_whitening(width, rows, batches)
                for name in ("mean", "matrix", "inverse_matrix"):
                    getattr(self, name).copy_(getattr(scaler.whitening, name))


class Layer(nn.Module):
    """One layer's training SAE, its scaling, and its trainer's counters: steps since each component fired, and who fired in this one."""

    idle: Tensor
    fired: Tensor

    def __init__(self, config: SaeLensConfig, sae: TrainingSAE) -> None:
        super().__init__()
        self.sae, self.scaling = sae, Scaling(sae.cfg.normalize_activations, sae.cfg.d_in)
        self.register_buffer("idle", torch.zeros(config.features, dtype=torch.long), persistent=False)
        self.register_buffer("fired", torch.zeros(config.features, dtype=torch.bool), persistent=False)
        own = DictionaryConfig(features=config.features, k=max(1, min(round(config.k), config.features)))
        self.selection: TopK | BatchTopK | None = None
        """What k at inference means: the k largest of a row, or the threshold at which k are active on average."""
        if config.architecture in TOPK_LIKE:
            self.selection = (BatchTopK if config.architecture in BATCH_LIKE else TopK)(own, config.features)

    def coefficients(self, step: int) -> dict[str, float]:
        """Their penalty weights at a step: a linear rise from zero over each one's own warm-up."""
        found = {}
        for name, given in self.sae.get_coefficients().items():
            value, warm_up = given if isinstance(given, tuple) else (given, 0)
            found[name] = value * (step / warm_up) if step < warm_up else value
        return found

    def end_step(self) -> None:
        """Advance the counters."""
        self.idle.add_(1).masked_fill_(self.fired, 0)
        self.fired.zero_()
