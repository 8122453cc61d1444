"""SAELens: a folder with cfg.json and sae_weights.safetensors for each coder (layouts of versions 5 and 6), or `RELEASE:ID` of its list."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decomp_bench.errors import UserError
from decomp_bench.interop._files import Source, need
from decomp_bench.interop._places import between
from decomp_bench.interop._plain import Plain

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = re.compile(r"standard|topk|gated|jumprelu|batchtopk|matryoshka_batchtopk|(jumprelu_)?(skip_)?transcoder")
NORMALISED = {
    "layer_norm": "each row by its own mean and deviation",
    "constant_norm_rescale": "each row to one length",
    "covariance_whitening": "by a whitening that is not folded in",
}


def read(given: str) -> tuple[list[Plain], dict[str, str]]:
    """The coders of a folder or a release, and the hashes of the files; raises UserError for what is not supported."""
    if not Path(given).expanduser().exists() and re.fullmatch(r"[\w.-]+:.+", given):
        return _of_release(given)
    source = Source(given, f"{CONFIG} and {WEIGHTS}")
    parts = [source] if source.has(CONFIG) else [source.inside(name) for name in source.folders_with(CONFIG)]
    if not parts:
        raise UserError(f"{source} has no {CONFIG}; give the folder that holds it and {WEIGHTS}")
    return [_of_folder(part) for part in parts], source.used


def _of_folder(source: Source) -> Plain:
    config = source.json(CONFIG)
    config = {**config, **(config.get("metadata") or {})}
    scaler = source.json("activation_scaler.json") if source.has("activation_scaler.json") else {}
    return coder(config, source.tensors(WEIGHTS), scaler.get("scaling_factor"), str(source))


def _of_release(given: str) -> tuple[list[Plain], dict[str, str]]:
    from sae_lens import SAE

    release, name = given.split(":", 1)
    try:
        sae: Any = SAE.from_pretrained(release, name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"sae-lens cannot load {given} ({reason}); without network give a local folder") from None
    config = sae.cfg.to_dict()
    weights = {key: value.detach().float().cpu() for key, value in sae.state_dict().items()}
    held = {f"{given}/{key}": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for key, value in weights.items()}
    return [coder({**config, **config["metadata"]}, weights, None, given)], held


def coder(config: dict[str, Any], weights: dict[str, Tensor], scale: float | None, where: str) -> Plain:
    """A plain coder from a flat config and its tensors; `scale` is that of its inputs where it is not folded in."""
    chosen = _activation(config, weights, where)
    _check_normalisation(config, scale, where)
    if config.get("reshape_activations", "none") != "none":
        raise UserError(f"{where} reads the heads of attention; what is replaced and scored is the MLPs")
    gated = chosen["activation"] == "gated"
    need(weights, ("W_enc", "W_dec", "b_dec", "b_gate" if gated else "b_enc"), where)
    factor = weights.get("scaling_factor") if config.get("finetuning_scaling_factor") else None
    W_dec = weights["W_dec"] if factor is None else weights["W_dec"] * factor[:, None]
    apart = "d_out" in config
    place = between(config.get("hook_name", config.get("hook_point")), config.get("hook_name_out") if apart else config.get("hook_name"))
    if apart and place.end is None and place.layer is not None:
        place = replace(place, end="in")
    made = Plain(weights["W_enc"].T, weights["b_gate" if gated else "b_enc"], W_dec[:, None], weights["b_dec"], place=place, **chosen)
    if not apart and config.get("apply_b_dec_to_input", True):
        made = made.shifted(weights["b_dec"])
    if scale is not None:
        made = _unscaled(made, scale, bool(config.get("rescale_acts_by_decoder_norm")))
    if config.get("rescale_acts_by_decoder_norm") and made.activation in ("topk", "batchtopk"):
        made = made.strengths_scaled(made.W_dec.norm(dim=2).squeeze(1).clamp(min=1e-12))
    return made.with_skip(weights.get("W_skip"))


def _activation(config: dict[str, Any], weights: dict[str, Tensor], where: str) -> dict[str, Any]:
    """What the architecture is in our terms."""
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if not ARCHITECTURES.fullmatch(architecture):
        raise UserError(
            f"{where}: architecture '{architecture}' is not supported; supported are standard, topk, jumprelu, batchtopk and transcoders"
        )
    if architecture == "topk" or function == "topk":
        return {"activation": "topk", "k": k}
    if function != "relu":
        raise UserError(f"{where}: activation function '{function}' is not supported; it must be relu or topk")
    if architecture == "gated":
        return {"activation": "gated", "r_mag": weights.get("r_mag"), "b_mag": weights.get("b_mag")}
    if "topk_threshold" in weights:
        threshold = weights["topk_threshold"].float()
        known = threshold.expand(len(weights["b_enc"])).clone() if float(threshold) > 0 else None
        return {"activation": "batchtopk", "k": max(1, round(float(k or 1))), "threshold": known}
    if "threshold" in weights:
        return {"activation": "jumprelu", "threshold": weights["threshold"]}
    return {"activation": "relu"}


def _check_normalisation(config: dict[str, Any], scale: float | None, where: str) -> None:
    kind = config.get("normalize_activations") or "none"
    if kind in NORMALISED:
        raise UserError(f"{where} normalises its inputs {NORMALISED[kind]} ({kind}), which fixed weights cannot do")
    if kind not in ("none", False) and scale is None:
        raise UserError(
            f"{where} was trained on scaled inputs ({kind}) and the scale is not there; fold it in with sae-lens and save it again"
        )


def _unscaled(made: Plain, scale: float, rescaled: bool) -> Plain:
    """Fold the scale of inputs and outputs into the weights."""
    threshold = None if made.threshold is None else made.threshold / scale if rescaled else made.threshold
    return replace(made.read_scaled(scale).written_scaled(1 / scale), threshold=threshold)


# ---- writing


@torch.no_grad()
def write(coders: Sequence[Plain], folder: Path, about: dict[str, Any]) -> list[Path]:
    """A folder for each coder, saved by sae-lens itself; raises UserError for what sae-lens has no architecture for."""
    for made in coders:
        if made.W_dec.shape[1] > 1:
            raise UserError("sae-lens has no cross-layer transcoder; export it to circuit-tracer")
        if made.place.end == "in" and made.activation == "topk":
            raise UserError(
                "sae-lens has no transcoder with topk, only with relu or thresholds; train it with batchtopk, or export it to sparsify"
            )
    return [_save(made, folder, about) for made in coders]


def _save(made: Plain, folder: Path, about: dict[str, Any]) -> Path:
    hook_in, hook_out = f"blocks.{made.layer}.mlp.hook_in", f"blocks.{made.layer}.hook_mlp_out"
    apart = made.place.end == "in"
    sae = _empty(made, apart)
    for name, value in _tensors(made).items():
        getattr(sae, name).data = value.contiguous().clone()
    hooks = {"hook_name": hook_in, "hook_name_out": hook_out} if apart else {"hook_name": hook_out}
    for key, value in {**hooks, "model_name": about["model"], "prepend_bos": True, "made_by": about["made_by"]}.items():
        sae.cfg.metadata[key] = value
    path = folder / (hook_in if apart else hook_out)
    sae.save_model(path)
    return path


def _tensors(made: Plain) -> dict[str, Tensor]:
    tensors = {"W_enc": made.W_enc.T, "W_dec": made.W_dec[:, 0], "b_dec": made.b_dec}
    if made.activation == "gated":
        assert made.r_mag is not None
        assert made.b_mag is not None
        tensors |= {"b_gate": made.b_enc, "r_mag": made.r_mag, "b_mag": made.b_mag}
    else:
        tensors["b_enc"] = made.b_enc
    if made.threshold is not None:
        tensors["threshold"] = made.threshold
    if made.W_skip is not None:
        tensors["W_skip"] = made.W_skip
    return tensors


def _empty(made: Plain, apart: bool) -> Any:
    """The library's own module for a coder's architecture, its weights still to be set."""
    from sae_lens.saes import transcoder
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    sizes: dict[str, Any] = {"d_in": made.W_enc.shape[1], "d_sae": made.n, "apply_b_dec_to_input": False}
    jumps, skips = made.threshold is not None, made.W_skip is not None
    if apart:
        name = f"{'JumpReLU' if jumps else ''}{'Skip' if skips else ''}Transcoder"
        return getattr(transcoder, name)(getattr(transcoder, f"{name}Config")(d_out=made.W_dec.shape[2], **sizes))
    if skips:
        raise UserError("sae-lens has no autoencoder with a skip connection")
    if jumps:
        return JumpReLUSAE(JumpReLUSAEConfig(**sizes))
    if made.activation == "topk":
        assert made.k is not None
        return TopKSAE(TopKSAEConfig(k=made.k, **sizes))
    if made.activation == "gated":
        return GatedSAE(GatedSAEConfig(**sizes))
    if made.activation != "relu":
        raise UserError(f"sae-lens has no {made.activation} autoencoder")
    return StandardSAE(StandardSAEConfig(**sizes))
