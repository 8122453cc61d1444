"""Where each family of causal language models keeps its parts, and how a folder says so for a family that is not listed here.

A fused matrix (one map that computes q, k and v, or gate and up) is split at loading into separate linear maps, so that a component
belongs to one of them; see `arrange`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from decomp_bench.config import Config, merge, parse, read_yaml
from decomp_bench.errors import UserError

FILE = "decomp_bench.yaml"
"""Beside config.json: a Layout, or the keys in which one differs from the table's."""
MAPS = ("mlp.gate", "mlp.up", "mlp.down", "attn.q", "attn.k", "attn.v", "attn.o")
"""Canonical names of linear maps, in the order in which a unit runs them. The first one of an MLP is the map that is activated."""


class Layout(Config):
    """Module paths of an architecture. `block` is a path in the model with `{}` for the layer; all others are paths inside a block."""

    block: str
    mlp: str | tuple[str, ...]
    """The MLP; where a block has no such module, those that run one after another instead, such as [fc1, activation_fn, fc2]."""
    attn: str | None = None
    maps: dict[str, str | None] = Field(default_factory=dict)
    """Canonical name (`mlp.up`) to path; names joined by + (`attn.q+attn.k+attn.v`) share a fused matrix; null removes a map."""
    interleaved: bool = False
    """Whether a fused attention matrix goes head by head (q, k, v of head 0, then of head 1) and not part by part."""

    @field_validator("block")
    @classmethod
    def _counts(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError("must hold {} once, in place of the layer, such as model.layers.{}")
        return value

    @field_validator("maps")
    @classmethod
    def _named(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        wrong = [name for key in value for name in key.split("+") if name not in MAPS]
        if wrong:
            raise ValueError(f"unknown map '{wrong[0]}'; known: {', '.join(MAPS)}")
        return value


def _maps(*, gated: bool, o: str = "self_attn.o_proj") -> dict[str, str | None]:
    names = (*(("gate",) if gated else ()), "up", "down")
    heads: dict[str, str | None] = {f"attn.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v")}
    return {**{f"mlp.{name}": f"mlp.{name}_proj" for name in names}, **heads, "attn.o": o}


_LLAMA = Layout(block="model.layers.{}", mlp="mlp", attn="self_attn", maps=_maps(gated=True))
_QKV = "attn.q+attn.k+attn.v"

# model_type of config.json -> layout. A new architecture is a new row.
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    "arcee": Layout(block="model.layers.{}", mlp="mlp", attn="self_attn", maps=_maps(gated=False)),
    "gpt2": Layout(
        block="transformer.h.{}",
        mlp="mlp",
        attn="attn",
        maps={"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj", _QKV: "attn.c_attn", "attn.o": "attn.c_proj"},
    ),
    "gpt_neo": Layout(
        block="transformer.h.{}",
        mlp="mlp",
        attn="attn.attention",
        maps={
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
            **{f"attn.{name}": f"attn.attention.{name}_proj" for name in ("q", "k", "v")},
            "attn.o": "attn.attention.out_proj",
        },
    ),
    "gpt_neox": Layout(
        block="gpt_neox.layers.{}",
        mlp="mlp",
        attn="attention",
        maps={
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
            _QKV: "attention.query_key_value",
            "attn.o": "attention.dense",
        },
        interleaved=True,
    ),
    "opt": Layout(
        block="model.decoder.layers.{}",
        mlp=("fc1", "activation_fn", "fc2"),
        attn="self_attn",
        maps={**_maps(gated=False, o="self_attn.out_proj"), "mlp.up": "fc1", "mlp.down": "fc2"},
    ),
    "phi": Layout(
        block="model.layers.{}",
        mlp="mlp",
        attn="self_attn",
        maps={**_maps(gated=False, o="self_attn.dense"), "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    ),
    "phi3": Layout(
        block="model.layers.{}",
        mlp="mlp",
        attn="self_attn",
        maps={
            "mlp.gate+mlp.up": "mlp.gate_up_proj",
            "mlp.down": "mlp.down_proj",
            _QKV: "self_attn.qkv_proj",
            "attn.o": "self_attn.o_proj",
        },
    ),
}


def layout_of(model_type: str, name: str, folder: Path | None) -> tuple[Layout, bool]:
    """The layout of an architecture, and whether the model's folder had a say in it.

    Raises UserError for an architecture that neither the table nor the folder knows, and for a broken file.
    """
    known = LAYOUTS.get(model_type)
    file = folder / FILE if folder else None
    if file is not None and file.is_file():
        base = known.model_dump(exclude_defaults=True) if known else {}
        return parse(Layout, merge(base, read_yaml(file)), str(file)), True
    if known is None:
        place = str(file) if file else f"{FILE} beside config.json of a local copy (hf:FOLDER)"
        raise UserError(
            f"{name}: architecture '{model_type}' is not known; name its module paths (block, mlp, attn, maps) in {place}, "
            f"as the README shows; known: {', '.join(sorted(LAYOUTS))}"
        )
    return known, False
