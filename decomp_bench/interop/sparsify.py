"""sparsify: a folder for each hookpoint (a module's path) with sae.safetensors and cfg.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from decomp_bench.checkpoint import write_tensors
from decomp_bench.errors import UserError
from decomp_bench.files import write_json
from decomp_bench.interop._files import Source, need
from decomp_bench.interop._places import MODULE, place
from decomp_bench.interop._plain import Plain

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(given: str) -> tuple[list[Plain], dict[str, str]]:
    """The coders of a hookpoint or of a whole run, and the hashes of the files."""
    source = Source(given, f"{WEIGHTS} and {CONFIG}")
    if source.has(WEIGHTS):
        return [_coder(source, source.path.resolve().name)], source.used
    names = source.folders_with(WEIGHTS)
    if not names:
        raise UserError(f"{source} has no {WEIGHTS}; give a hookpoint's folder or a run's folder of them")
    return [_coder(source.inside(name), _hookpoint(name)) for name in names], source.used


def _hookpoint(folder: str) -> str:
    """The part of a folder's path that names a module: runs of several seeds have one more below it."""
    return next((part for part in reversed(folder.split("/")) if MODULE.search(part)), folder)


def _coder(source: Source, hookpoint: str) -> Plain:
    config, weights = source.json(CONFIG), source.tensors(WEIGHTS)
    need(weights, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), f"{source}/{WEIGHTS}")
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise UserError(f"{source}: activation '{activation}' is not supported; it must be topk or groupmax")
    transcodes = bool(config.get("transcode"))
    found = place(hookpoint, "in" if transcodes else "out")
    if found.end == "in" and not transcodes:
        raise UserError(f"{hookpoint}: an autoencoder of what an MLP reads; here autoencoders are of what it writes")
    made = Plain(
        weights["encoder.weight"],
        weights["encoder.bias"],
        weights["W_dec"][:, None],
        weights["b_dec"],
        activation,
        config.get("k"),
        place=found,
    )
    if found.end is None and found.layer is None:
        made = replace(made, place=replace(found, end="in" if transcodes else "out"))
    return (made if transcodes else made.shifted(weights["b_dec"])).with_skip(weights.get("W_skip"))


# ---- writing


def write(coders: Sequence[Plain], folder: Path, about: dict[str, Any]) -> list[Path]:
    """A folder for each MLP's module; raises UserError for anything but topk (and groupmax) coders of one layer."""
    for made in coders:
        if made.W_dec.shape[1] > 1:
            raise UserError("sparsify has no cross-layer transcoder; export it to circuit-tracer")
        if made.activation == "batchtopk":
            raise UserError(
                "batchtopk is a threshold at inference, and sparsify selects k of each row; export to saelens, or train with topk"
            )
        if made.activation not in ("topk", "groupmax"):
            raise UserError(f"sparsify has no {made.activation} coder, only topk and groupmax; export to saelens")
    return [_save(made, folder / f"layers.{made.layer}.mlp") for made in coders]


def _save(made: Plain, folder: Path) -> Path:
    transcodes = made.place.end == "in"
    inner = made if transcodes else made.shifted(-made.b_dec)
    weights = {"encoder.weight": inner.W_enc, "encoder.bias": inner.b_enc, "W_dec": inner.W_dec[:, 0], "b_dec": inner.b_dec}
    write_tensors(weights if made.W_skip is None else {**weights, "W_skip": made.W_skip}, folder / WEIGHTS)
    config = {"activation": made.activation, "num_latents": made.n, "k": made.k, "transcode": transcodes, "d_in": made.W_enc.shape[1]}
    extra = {"expansion_factor": 32, "normalize_decoder": False, "multi_topk": False, "skip_connection": made.W_skip is not None}
    write_json({**config, **extra}, folder / CONFIG)
    return folder
