"""nn_decompositions: a folder with encoder.pt (a state dict) and config.json, for one layer's transcoder or a cross-layer one.

They read what the norm before an MLP gives and write the MLP's output. BatchTopK has no threshold there: it is calibrated here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decomp_bench.errors import UserError
from decomp_bench.interop._files import Source, need
from decomp_bench.interop._places import Place
from decomp_bench.interop._plain import Plain

CONFIG, WEIGHTS = "config.json", "encoder.pt"
ACTIVATIONS = {"vanilla": "relu", "topk": "topk", "batchtopk": "batchtopk", "jumprelu": "jumprelu"}
UNSUPPORTED = {
    "input_unit_norm": "it normalises each row by itself and is scaled back by the true output",
    "train_post_encoder": "it has a second encoder",
    "skip_connection": "a skip connection is not read from this format",
}


def read(given: str) -> tuple[list[Plain], dict[str, str]]:
    """The coders of a checkpoint, and the hashes of its files; raises UserError for options that fixed weights cannot have."""
    source = Source(given, f"{WEIGHTS} and {CONFIG}")
    config, weights = source.json(CONFIG), source.state_dict(WEIGHTS)
    for key, reason in UNSUPPORTED.items():
        if config.get(key):
            raise UserError(f"{source} was trained with {key}: {reason}")
    if config.get("encoder_type") not in ACTIVATIONS:
        raise UserError(f"{source}: encoder type '{config.get('encoder_type')}' is not supported; supported are {', '.join(ACTIVATIONS)}")
    if "W_enc.0" not in weights:
        return [_single(source, config, weights)], source.used
    layers = _layers(config, sum(key.startswith("W_enc.") for key in weights))
    return [_across(source, config, weights, number, layer) for number, layer in enumerate(layers)], source.used


def _single(source: Source, config: dict[str, Any], weights: dict[str, Tensor]) -> Plain:
    need(weights, ("W_enc", "b_enc", "W_dec", "b_dec"), f"{source}/{WEIGHTS}")
    same = config.get("input_size") == config.get("output_size")
    chosen = _activation(config, weights.get("jumprelu.log_threshold"))
    made = Plain(weights["W_enc"].T, weights["b_enc"], weights["W_dec"][:, None], weights["b_dec"], place=Place(end="in"), **chosen)
    return made.shifted(weights["b_dec"]) if config.get("pre_enc_bias") and same else made


def _across(source: Source, config: dict[str, Any], weights: dict[str, Tensor], number: int, layer: int) -> Plain:
    names = [f"{name}.{number}" for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    need(weights, tuple(names), f"{source}/{WEIGHTS}")
    W_enc, b_enc, W_dec, b_dec = (weights[name] for name in names)
    chosen = _activation(config, weights.get(f"jumprelu_log_thresholds.{number}"))
    return Plain(W_enc.T, b_enc, W_dec.transpose(0, 1), b_dec, place=Place(layer, "in"), **chosen)


def _activation(config: dict[str, Any], log_threshold: Tensor | None) -> dict[str, Any]:
    kind = ACTIVATIONS[config["encoder_type"]]
    if kind == "jumprelu":
        return {"activation": kind, "threshold": None if log_threshold is None else torch.exp(log_threshold)}
    return {"activation": kind} if kind == "relu" else {"activation": kind, "k": int(config.get("top_k", 32))}


def _layers(config: dict[str, Any], count: int) -> list[int]:
    """The config writes what is no scalar as text, such as "[0, 1, 2, 3]"."""
    text = str(config.get("layers", ""))
    found = [int(part) for part in "".join(c if c.isdigit() else " " for c in text).split()]
    return found if len(found) == count else list(range(count))
