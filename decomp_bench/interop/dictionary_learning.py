"""dictionary_learning: a folder `trainer_N` with ae.pt (a state dict) and config.json for each coder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decomp_bench.errors import UserError
from decomp_bench.files import atomically, write_json
from decomp_bench.interop._files import Source, need
from decomp_bench.interop._places import RESIDUAL, Place, place
from decomp_bench.interop._plain import Plain

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = ("encoder.weight", "decoder.weight")
NEEDED = {
    "AutoEncoder": (*LINEAR, "encoder.bias", "bias"),
    "AutoEncoderNew": (*LINEAR, "encoder.bias", "decoder.bias"),
    "AutoEncoderTopK": (*LINEAR, "encoder.bias", "b_dec"),
    "BatchTopKSAE": (*LINEAR, "encoder.bias", "b_dec"),
    "GatedAutoEncoder": (*LINEAR, "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "JumpReluAutoEncoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "MatryoshkaBatchTopKSAE": ("W_enc", "b_enc", "W_dec", "b_dec"),
}
"""Class to the tensors that it cannot do without."""


def read(given: str) -> tuple[list[Plain], dict[str, str]]:
    """The coders of a folder, and the hashes of its files; raises UserError for a class that is not supported."""
    source = Source(given, f"{WEIGHTS} and {CONFIG}")
    parts = [source] if source.has(WEIGHTS) else [source.inside(name) for name in source.folders_with(WEIGHTS)]
    if not parts:
        raise UserError(f"{source} has no {WEIGHTS}; give the folder that holds it and {CONFIG}, or a folder of trainer_N folders")
    return [_coder(part) for part in parts], source.used


def _coder(source: Source) -> Plain:
    whole = source.json(CONFIG)
    config = whole.get("trainer") or {}
    if (whole.get("buffer") or {}).get("io") == "in":
        raise UserError(f"{source} reconstructs what a module reads; here autoencoders are of what an MLP writes")
    kind, weights = config.get("dict_class"), source.state_dict(WEIGHTS)
    if kind not in NEEDED:
        raise UserError(f"{source}: dictionary class '{kind}' is not supported; supported are {', '.join(NEEDED)}")
    need(weights, NEEDED[kind], f"{source}/{WEIGHTS}")
    linear = "encoder.weight" in weights
    W_enc = weights["encoder.weight"] if linear else weights["W_enc"].T
    W_dec = weights["decoder.weight"].T if linear else weights["W_dec"]
    b_dec = weights[next(name for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in weights)]
    b_enc = weights[next(name for name in ("encoder.bias", "b_enc", "gate_bias") if name in weights)]
    made = Plain(W_enc, b_enc, W_dec[:, None], b_dec, place=_place(config), **_activation(kind, config, weights))
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        return made
    made = made.shifted(b_dec)
    if kind == "AutoEncoder":  # loaded by the library with unit decoder columns
        return made.strengths_scaled(made.W_dec.norm(dim=2).squeeze(1).clamp(min=1e-12))
    return made


def _activation(kind: str, config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    if kind == "GatedAutoEncoder":
        return {"activation": "gated", "r_mag": weights["r_mag"], "b_mag": weights["mag_bias"]}
    if kind == "JumpReluAutoEncoder":
        return {"activation": "jumprelu", "threshold": weights["threshold"]}
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return {"activation": "relu"}
    k = weights.get("k", config.get("k"))
    k = None if k is None else int(k)
    if kind == "AutoEncoderTopK":
        return {"activation": "topk", "k": k}
    threshold = weights.get("threshold")
    if threshold is not None and float(threshold) < 0:  # -1 until the library's running mean has begun
        threshold = None
    n = len(weights["encoder.bias"] if "encoder.bias" in weights else weights["b_enc"])
    return {"activation": "batchtopk", "k": k, "threshold": None if threshold is None else threshold.float().expand(n).clone()}


def _place(config: dict[str, Any]) -> Place:
    """From the module's name and the layer; these coders reconstruct what they read."""
    name, layer = str(config.get("submodule_name") or ""), config.get("layer")
    found = place(name, "out")
    if found == Place() and "resid" in name:
        raise UserError(f"{name} {RESIDUAL}")
    end = found.end or ("out" if "mlp" in name else None)
    return Place(found.layer if found.layer is not None else layer if isinstance(layer, int) else None, end)


# ---- writing


def write(coders: Sequence[Plain], folder: Path, about: dict[str, Any]) -> list[Path]:
    """A folder trainer_N for each coder; raises UserError for transcoders, which the format does not have."""
    if any(made.place.end == "in" or made.W_dec.shape[1] > 1 for made in coders):
        raise UserError("dictionary_learning has autoencoders only; export transcoders to saelens, sparsify or circuit-tracer")
    return [_save(made, folder / f"trainer_{number}", about) for number, made in enumerate(coders)]


def _save(made: Plain, folder: Path, about: dict[str, Any]) -> Path:
    kind, weights = _tensors(made)
    trainer = {
        "dict_class": kind,
        "activation_dim": made.W_enc.shape[1],
        "dict_size": made.n,
        "layer": made.layer,
        "lm_name": about["model"],
    }
    trainer |= {"submodule_name": f"model.layers.{made.layer}.mlp", "made_by": about["made_by"]} | ({"k": made.k} if made.k else {})
    plain = {key: value.detach().contiguous().clone() for key, value in weights.items()}
    atomically(folder / WEIGHTS, lambda temporary: torch.save(plain, temporary))
    write_json({"trainer": trainer, "buffer": {"io": "out"}}, folder / CONFIG)
    return folder


def _tensors(made: Plain) -> tuple[str, dict[str, Tensor]]:
    """Class and state dict of a coder, its input bias taken out of the encoder's."""
    if made.activation == "jumprelu":
        assert made.threshold is not None
        weights = {"W_enc": made.W_enc.T, "b_enc": made.b_enc, "W_dec": made.W_dec[:, 0], "b_dec": made.b_dec}
        return "JumpReluAutoEncoder", {**weights, "threshold": made.threshold}
    if made.activation == "relu":  # the class whose loader leaves the decoder's length alone
        weights = {"encoder.weight": made.W_enc, "encoder.bias": made.b_enc, "decoder.weight": made.W_dec[:, 0].T}
        return "AutoEncoderNew", {**weights, "decoder.bias": made.b_dec}
    inner = made.shifted(-made.b_dec)
    weights = {"encoder.weight": inner.W_enc, "decoder.weight": inner.W_dec[:, 0].T}
    if made.activation == "gated":
        assert inner.r_mag is not None
        assert inner.b_mag is not None
        return "GatedAutoEncoder", {
            **weights,
            "decoder_bias": made.b_dec,
            "gate_bias": inner.b_enc,
            "r_mag": inner.r_mag,
            "mag_bias": inner.b_mag,
        }
    if made.activation not in ("topk", "batchtopk"):
        raise UserError(f"dictionary_learning has no {made.activation} autoencoder")
    threshold = torch.tensor(-1.0) if made.threshold is None else made.threshold[0]
    weights |= {"encoder.bias": inner.b_enc, "b_dec": made.b_dec, "k": torch.tensor(made.k, dtype=torch.int), "threshold": threshold}
    return "AutoEncoderTopK" if made.activation == "topk" else "BatchTopKSAE", weights
