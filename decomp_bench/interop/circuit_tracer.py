"""circuit-tracer: sets of per-layer transcoders (layer_N.safetensors) and cross-layer ones (W_enc_N, W_dec_N), with a config.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from decomp_bench.checkpoint import write_tensors
from decomp_bench.errors import UserError
from decomp_bench.files import write_text
from decomp_bench.interop._files import Source, need
from decomp_bench.interop._places import Place, between
from decomp_bench.interop._plain import Plain

CONFIG = "config.yaml"
INPUT, OUTPUT = "mlp.hook_in", "hook_mlp_out"
THRESHOLD = "activation_function.threshold"


def read(given: str) -> tuple[list[Plain], dict[str, str]]:
    """The transcoders of a folder, and the hashes of the files."""
    source = Source(given, f"{CONFIG} and safetensors files")
    config = source.yaml(CONFIG)
    if source.has("W_enc_0.safetensors"):
        count = len(list(source.path.glob("W_enc_*.safetensors")))
        return [_cross_layer(source, config, layer, count) for layer in range(count)], source.used
    files = _files(source, config)
    if not files:
        raise UserError(f"{source} has neither layer_0.safetensors nor W_enc_0.safetensors; give the folder that holds the weights")
    return [_per_layer(source, config, layer, name, turned) for layer, name, turned in files], source.used


def _files(source: Source, config: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """Layer, file, and whether its decoder is [d, n] (the layout of version 0.1, which listed its files)."""
    listed = config.get("transcoders") or []
    if listed and isinstance(listed[0], dict):
        return [(int(entry["layer"]), str(entry["filepath"]), True) for entry in listed]
    if listed:
        raise UserError(
            f"{source}/{CONFIG} lists files elsewhere; fetch them into one folder as layer_N.safetensors and leave the list out"
        )
    count = len(list(source.path.glob("layer_*.safetensors")))
    return [(layer, f"layer_{layer}.safetensors", False) for layer in range(count)]


def _place(config: dict[str, Any], layer: int) -> Place:
    hooks = [config.get(key) for key in ("feature_input_hook", "feature_output_hook")]
    read, write = (f"blocks.{layer}.{hook}" if hook else None for hook in hooks)
    found = between(read or f"blocks.{layer}.hook_resid_mid", write)  # the tool's default
    return replace(found, layer=layer)


def _per_layer(source: Source, config: dict[str, Any], layer: int, name: str, turned: bool) -> Plain:
    weights = source.tensors(name)
    need(weights, ("W_enc", "b_enc", "W_dec", "b_dec"), f"{source}/{name}")
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    n, width = len(weights["b_enc"]), len(weights["b_dec"])
    if (turned and n == width) or W_dec.shape != (n, width):
        W_dec = W_dec.T
    chosen: dict[str, Any] = {"activation": "relu"}
    if config.get("activation") == "topk" or "k" in weights:
        k = weights.get("k", config.get("k"))
        chosen = {"activation": "topk", "k": None if k is None else int(k)}
    elif THRESHOLD in weights:
        chosen = {"activation": "jumprelu", "threshold": _positive(weights[THRESHOLD].flatten(), f"{source}/{name}")}
    made = Plain(W_enc, weights["b_enc"], W_dec[:, None], weights["b_dec"], place=_place(config, layer), **chosen)
    return made.with_skip(weights.get("W_skip"))


def _cross_layer(source: Source, config: dict[str, Any], layer: int, count: int) -> Plain:
    weights = source.tensors(f"W_enc_{layer}.safetensors") | source.tensors(f"W_dec_{layer}.safetensors")
    need(weights, (f"W_enc_{layer}", f"b_enc_{layer}", f"b_dec_{layer}", f"W_dec_{layer}"), source)
    threshold = weights.get(f"threshold_{layer}")
    chosen: dict[str, Any] = (
        {} if threshold is None else {"activation": "jumprelu", "threshold": _positive(threshold.flatten(), str(source))}
    )
    place = _place(config, layer)
    W_enc, W_dec = weights[f"W_enc_{layer}"], weights[f"W_dec_{layer}"]
    if W_dec.dim() != 3 or W_dec.shape[1] != count - layer:
        raise UserError(f"{source}: W_dec_{layer} must write to {count - layer} layers, [n, {count - layer}, d]; it is {list(W_dec.shape)}")
    return Plain(W_enc, weights[f"b_enc_{layer}"], W_dec, weights[f"b_dec_{layer}"], place=place, **chosen)


def _positive(threshold: Tensor, where: str) -> Tensor:
    """The tool lets whatever is above a threshold through; ours are not negative."""
    if bool((threshold < 0).any()):
        raise UserError(f"{where} has thresholds below zero, which would let negative strengths through; they are not supported")
    return threshold


# ---- writing


def write(coders: Sequence[Plain], folder: Path, about: dict[str, Any]) -> list[Path]:
    """The files of a set or of a cross-layer transcoder; raises UserError for what the tool has no loader for."""
    across = any(made.W_dec.shape[1] > 1 for made in coders)
    for made in coders:
        if made.place.end != "in":
            raise UserError("circuit-tracer replaces MLPs by transcoders; an autoencoder does not fit, export it to saelens")
        if made.activation not in (("relu", "jumprelu", "batchtopk") if across else ("relu", "topk", "jumprelu", "batchtopk")):
            raise UserError(f"circuit-tracer has no {made.activation} for {'cross-layer' if across else 'per-layer'} transcoders")
        if across and made.W_skip is not None:
            raise UserError("circuit-tracer does not store skip connections of cross-layer transcoders")
    if [made.layer for made in coders] != list(range(len(coders))):
        raise UserError(f"circuit-tracer needs every layer from 0 on; this run has {', '.join(str(made.layer) for made in coders)}")
    paths = [path for made in coders for path in (_write_across(made, folder) if across else _write_layer(made, folder))]
    topk = {"activation": "topk", "k": coders[0].k} if coders[0].activation == "topk" else {}
    config = {"model_name": about["model"], "model_kind": "cross_layer_transcoder" if across else "transcoder_set"}
    config |= {"feature_input_hook": INPUT, "feature_output_hook": OUTPUT, "scan_name": about["run"], **topk}
    write_text(yaml.safe_dump(config, sort_keys=False), folder / CONFIG)
    return [*paths, folder / CONFIG]


def _write_layer(made: Plain, folder: Path) -> list[Path]:
    weights = {"W_enc": made.W_enc, "b_enc": made.b_enc, "W_dec": made.W_dec[:, 0], "b_dec": made.b_dec}
    weights |= {THRESHOLD: made.threshold} if made.threshold is not None else {}
    weights |= {"W_skip": made.W_skip} if made.W_skip is not None else {}
    write_tensors(weights, folder / f"layer_{made.layer}.safetensors")
    return [folder / f"layer_{made.layer}.safetensors"]


def _write_across(made: Plain, folder: Path) -> list[Path]:
    i = made.layer
    encoder = {f"W_enc_{i}": made.W_enc, f"b_enc_{i}": made.b_enc, f"b_dec_{i}": made.b_dec}
    encoder |= {f"threshold_{i}": made.threshold} if made.threshold is not None else {}
    write_tensors(encoder, folder / f"W_enc_{i}.safetensors")
    write_tensors({f"W_dec_{i}": made.W_dec}, folder / f"W_dec_{i}.safetensors")
    return [folder / f"W_{part}_{i}.safetensors" for part in ("enc", "dec")]
