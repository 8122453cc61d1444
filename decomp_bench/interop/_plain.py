"""Coders as plain weights in a model's own coordinates: what every other tool's files come down to, and our dictionaries too."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from decomp_bench.config import parse
from decomp_bench.decomposer import Decomposer, Site
from decomp_bench.errors import UserError
from decomp_bench.interop._places import End, Place, gain
from decomp_bench.registry import method, names
from decomp_bench.targets import TargetModel

Kind = Literal["relu", "topk", "batchtopk", "jumprelu", "gated", "groupmax"]


@dataclass
class Plain:
    """One layer's coder: codes = activation(W_enc x + b_enc); place j of W_dec is the MLP output of the j-th layer from its own on.

    Raises UserError where shapes do not fit together, weights are not finite, or the activation lacks its k or thresholds.
    """

    W_enc: Float[Tensor, "_n _d_in"]
    b_enc: Float[Tensor, " _n"]
    W_dec: Float[Tensor, "_n _places _d_out"]
    b_dec: Float[Tensor, " _d_out"]
    """Bias of its own layer's output."""
    activation: Kind = "relu"
    k: int | None = None
    """Active components of a row (topk, groupmax), on average (batchtopk)."""
    threshold: Float[Tensor, " _n"] | None = None
    """Of jumprelu; of batchtopk the one that stands for k, where it is known."""
    r_mag: Float[Tensor, " _n"] | None = None
    """Of gated: the gate is open where W_enc x + b_enc > 0, the strength is relu(exp(r_mag) W_enc x + b_mag)."""
    b_mag: Float[Tensor, " _n"] | None = None
    W_skip: Float[Tensor, "_d_out _d_in"] | None = None
    """Always-on linear part of the output."""
    place: Place = field(default_factory=Place)

    def __post_init__(self) -> None:
        n, width = len(self.W_enc), self.W_dec.shape[-1]  # shapes are those of a file, and checked here rather than by annotations
        own = (self.b_enc, self.W_dec, self.threshold, self.r_mag, self.b_mag)
        fits = (self.W_enc.dim(), self.W_dec.dim(), self.b_dec.dim()) == (2, 3, 1) and len(self.b_dec) == width
        if not fits or any(part is not None and len(part) != n for part in own):
            raise UserError(f"weights do not fit together: encoder {tuple(self.W_enc.shape)}, decoder {tuple(self.W_dec.shape)}")
        if not all(bool(part.isfinite().all()) for part in (*own, self.W_enc, self.b_dec, self.W_skip) if part is not None):
            raise UserError("some weights are not finite; the file is broken or overflowed in a narrower number format")
        needed = {"topk": self.k, "groupmax": self.k, "batchtopk": self.k, "jumprelu": self.threshold, "gated": self.r_mag}
        if needed.get(self.activation, 0) is None:
            raise UserError(
                f"a {self.activation} coder without its {'k' if self.activation != 'jumprelu' else 'threshold'}; give a complete file"
            )

    @property
    def n(self) -> int:
        """Number of components."""
        return len(self.W_enc)

    @property
    def layer(self) -> int:
        """Its layer, which is known by the time it is used."""
        assert self.place.layer is not None
        return self.place.layer

    def shifted(self, bias: Float[Tensor, " d_in"]) -> Plain:
        """The same coder of x that was made to read x - bias."""
        moved = self.W_enc @ bias
        b_mag = None if self.b_mag is None or self.r_mag is None else self.b_mag - self.r_mag.exp() * moved
        return replace(self, b_enc=self.b_enc - moved, b_mag=b_mag)

    def read_scaled(self, scale: float | Float[Tensor, " d_in"]) -> Plain:
        """The same coder of x that was made to read x * scale."""
        skip = None if self.W_skip is None else self.W_skip * scale
        return replace(self, W_enc=self.W_enc * scale, W_skip=skip)

    def written_scaled(self, scale: float) -> Plain:
        """The same coder of y that was made to write y / scale."""
        skip = None if self.W_skip is None else self.W_skip * scale
        return replace(self, W_dec=self.W_dec * scale, b_dec=self.b_dec * scale, W_skip=skip)

    def strengths_scaled(self, scale: Float[Tensor, " n"]) -> Plain:
        """The same function with strengths times `scale`; thresholds are taken to be of the scaled strengths already."""
        b_mag = None if self.b_mag is None else self.b_mag * scale
        W_dec = self.W_dec / scale[:, None, None]
        return replace(self, W_enc=self.W_enc * scale[:, None], b_enc=self.b_enc * scale, W_dec=W_dec, b_mag=b_mag)

    def with_skip(self, weight: Float[Tensor, "d_out d_in"] | None) -> Plain:
        """With a skip connection from the input itself, whatever was folded before."""
        return self if weight is None else replace(self, W_skip=weight)

    def gained(self, target: TargetModel) -> Plain:
        """The same coder of what an MLP reads that was made to read the norm before its gain."""
        if not self.place.ungained:
            return self
        weight, bias = gain(target, self.layer)
        if bool((weight == 0).any()):
            raise UserError(
                f"the norm before MLP {self.layer} of {target.uri} has zeros in its gain, so nothing behind it can be read back"
            )
        scaled = self.read_scaled(1 / weight)
        moved = scaled.shifted(bias)
        skipped = moved.b_dec if moved.W_skip is None else moved.b_dec - moved.W_skip @ bias
        return replace(moved, b_dec=skipped, place=replace(self.place, ungained=False))


# ---- plain coders as one of our methods


def dictionary(end: str, across: bool) -> type[Decomposer]:
    """The registered method whose coders read this end of an MLP and write to its output, or to later ones as well (`across`)."""
    probe = SimpleNamespace(layers=(0, 1))
    wanted = (f"0.mlp.{end}", ["0.mlp.out", "1.mlp.out"][: 1 + across])
    for name in names():
        with suppress(UserError, AttributeError):  # a broken file; a method whose places follow from more than its layers
            kind: Any = method(name)
            if hasattr(kind, "folded") and (kind.read(probe, 0), kind.writes(probe, 0)) == wanted:
                return kind
    raise UserError(
        f"no registered method has coders that read an MLP's {end} and write to {'several outputs' if across else 'its output'}"
    )


@torch.no_grad()
def as_decomposer(coders: Sequence[Plain], target: TargetModel) -> Decomposer:
    """Coders of different layers as one decomposition; raises UserError for what our methods do not have or the target does not fit.

    A batchtopk coder without a threshold still has to be calibrated (`finish`) and given its known ones (`keep_thresholds`).
    """
    coders = sorted((coder.gained(target) for coder in coders), key=lambda coder: coder.layer)
    _check_together(coders, target)
    layers = tuple(coder.layer for coder in coders)
    first, across = coders[0], any(coder.W_dec.shape[1] > 1 for coder in coders)
    kind: Any = dictionary(str(first.place.end), across)
    chosen = {"features": first.n, "activation": first.activation, "k": first.k or 1, "steps": 0}
    chosen |= {"l1": 0, "l0": 0} | ({"skip": True} if first.W_skip is not None else {})  # whatever was penalised was not in our units
    _check_supported(kind, first)
    made: Any = kind(parse(kind.Config, chosen, "import"), target, layers, 0)
    for site, coder in zip(made.sites, coders, strict=True):
        own = made.coder(site)
        own.W_enc.copy_(coder.W_enc)
        own.b_enc.copy_(coder.b_enc)
        own.W_dec.copy_(coder.W_dec.flatten(1))
        made.output(site.slots[0].write).b_dec.copy_(coder.b_dec)
        if coder.W_skip is not None:
            own.W_skip.copy_(coder.W_skip)
        _set_activation(own.activation, coder)
    return made.eval()


def _check_together(coders: Sequence[Plain], target: TargetModel) -> None:
    """Raise UserError where coders cannot be one decomposition of this target."""
    layers = [coder.layer for coder in coders]
    target.layer_tuple(tuple(layers))
    if len(set(layers)) < len(layers):
        raise UserError(f"two coders are of the same layer ({', '.join(map(str, layers))}); import them as two runs, or give --layers")
    for what, values in (
        ("what they read", {coder.place.end for coder in coders}),
        ("activation", {coder.activation for coder in coders}),
        ("number of components", {coder.n for coder in coders}),
        ("k", {coder.k for coder in coders}),
        ("having a skip connection", {coder.W_skip is not None for coder in coders}),
    ):
        if len(values) > 1:
            raise UserError(f"the coders differ in {what} ({', '.join(sorted(map(str, values)))}); import each as a run of its own")
    for coder in coders:
        read, wrote = coder.W_enc.shape[1], coder.W_dec.shape[2]
        if (read, wrote) != (target.width, target.width):
            raise UserError(
                f"layer {coder.layer}: a coder from {read} to {wrote} numbers does not fit {target.uri}, whose width is {target.width}"
            )
    if any(coder.W_dec.shape[1] > 1 for coder in coders):
        places, wanted = [coder.W_dec.shape[1] for coder in coders], list(range(len(coders), 0, -1))
        if places != wanted:
            raise UserError(f"cross-layer coders must write to every later layer that is there ({wanted} places); these have {places}")


def _check_supported(kind: Any, coder: Plain) -> None:
    """Raise UserError for an activation or a skip connection that the method does not have."""
    known = get_args(kind.Config.model_fields["activation"].annotation)
    if coder.activation not in known:
        raise UserError(f"activation '{coder.activation}' is not supported by {kind.name}; it has {', '.join(known)}")
    if coder.W_skip is not None and "skip" not in kind.Config.model_fields:
        raise UserError(f"a skip connection is not supported by {kind.name}; import a checkpoint without one")


def _set_activation(activation: Any, coder: Plain) -> None:
    if coder.activation == "jumprelu" and coder.threshold is not None:
        activation.log_threshold.copy_(coder.threshold.clamp(min=torch.finfo(torch.float32).tiny).log())
    elif coder.activation == "batchtopk" and coder.threshold is not None:
        activation.table_threshold.fill_(float(coder.threshold[0]))
    elif coder.activation == "gated" and coder.r_mag is not None:
        activation.r_mag.copy_(coder.r_mag)
        activation.b_mag.copy_(coder.b_mag)


@torch.no_grad()
def keep_thresholds(decomposer: Decomposer, coders: Sequence[Plain]) -> None:
    """After a calibration, put the thresholds back that the coders brought along for their own k."""
    made: Any = decomposer
    known = {coder.layer: coder for coder in coders}
    for site in decomposer.sites:
        coder, activation = known[site.layer], made.coder(site).activation
        if coder.activation == "batchtopk" and coder.threshold is not None:
            activation.table_threshold[activation.table_k == coder.k] = float(coder.threshold[0])


def uncalibrated(coders: Sequence[Plain]) -> bool:
    """Whether thresholds have to be calibrated on data."""
    return any(coder.activation == "batchtopk" for coder in coders)


# ---- one of our methods as plain coders


@torch.no_grad()
def as_plain(decomposer: Decomposer) -> list[Plain]:
    """A decomposition's coders; raises UserError for a method that has none.

    A method gives them by `folded(site)`, or by `save_inference(folder)` where sae-lens saves what it trained.
    """
    if hasattr(decomposer, "save_inference"):
        from decomp_bench.interop.saelens import read

        made: Any = decomposer
        with TemporaryDirectory() as folder:
            made.save_inference(Path(folder))
            return read(folder)[0]
    if not hasattr(decomposer, "folded"):
        raise UserError(f"{decomposer.name} gives no encoder and decoder as plain weights, which is all that other tools' formats hold")
    return [_plain(decomposer, site) for site in decomposer.sites]


def _plain(decomposer: Any, site: Site) -> Plain:
    weights = {name: value.detach().cpu() for name, value in decomposer.folded(site).items()}
    places, width = len(site.slots), decomposer.target.size(site.slots[0].write)
    end: End = "in" if site.reads[0].endswith(".in") else "out"
    W_dec, b_dec = weights["W_dec"].unflatten(1, (places, width)), weights["b_dec"][:width]
    activation = decomposer.coder(site).activation
    config = activation.config
    kind = "batchtopk" if config.activation == "matryoshka" else config.activation  # what distinguishes it is its training
    if kind not in get_args(Kind):
        raise UserError(f"activation '{kind}' cannot be exported; retrain with one of {', '.join(get_args(Kind))}")
    rest: dict[str, Any] = {key: weights[key] for key in ("r_mag", "b_mag", "W_skip") if key in weights}
    rest |= {"k": config.k} if kind in ("topk", "batchtopk", "groupmax") else {}
    if kind == "jumprelu":
        rest["threshold"] = activation.log_threshold.exp().cpu()
    elif kind == "batchtopk":
        rest["threshold"] = activation.threshold(config.k).clamp(min=0).cpu().expand(site.n).clone()
    return Plain(weights["W_enc"], weights["b_enc"], W_dec, b_dec, kind, place=Place(site.layer, end), **rest)
