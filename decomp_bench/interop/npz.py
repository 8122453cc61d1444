"""Gemma-Scope-style params.npz: W_enc [d, n], b_enc, W_dec [n, d], b_dec and, for JumpReLU, threshold. It does not say where it belongs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decomp_bench.errors import UserError
from decomp_bench.files import atomically
from decomp_bench.interop._files import Source, need
from decomp_bench.interop._places import Place
from decomp_bench.interop._plain import Plain

WEIGHTS = "params.npz"


def read(given: str) -> tuple[list[Plain], dict[str, str]]:
    """The coder of a file, or those of a folder of them; the layer is taken from a folder `layer_N` on the way."""
    source = Source(given, WEIGHTS)
    if source.path.is_file():
        return [_coder(source, "", source.given)], source.used
    names = sorted((str(file.relative_to(source.path)) for file in source.path.rglob("*.npz")), key=lambda name: (_layer(name) or 0, name))
    if not names:
        raise UserError(f"{source} has no .npz file; give {WEIGHTS} or the folder that holds it")
    return [_coder(source, name, f"{source.given}/{name}") for name in names], source.used


def _coder(source: Source, name: str, path: str) -> Plain:
    weights = source.arrays(name)
    need(weights, ("W_enc", "b_enc", "W_dec", "b_dec"), path)
    threshold = weights.get("threshold")
    if threshold is not None and bool((threshold < 0).any()):
        raise UserError(f"{path} has thresholds below zero, which would let negative strengths through; they are not supported")
    chosen: dict[str, Any] = {} if threshold is None else {"activation": "jumprelu", "threshold": threshold}
    return Plain(weights["W_enc"].T, weights["b_enc"], weights["W_dec"][:, None], weights["b_dec"], place=Place(_layer(path)), **chosen)


def _layer(path: str) -> int | None:
    found = re.search(r"layer_(\d+)", path)
    return int(found[1]) if found else None


def write(coders: Sequence[Plain], folder: Path, about: dict[str, Any]) -> list[Path]:
    """layer_N/params.npz for each coder; raises UserError for what the format does not hold."""
    for made in coders:
        if made.W_dec.shape[1] > 1:
            raise UserError("npz has no cross-layer transcoder; export it to circuit-tracer")
        if made.activation not in ("relu", "jumprelu", "batchtopk") or made.W_skip is not None:
            raise UserError("npz holds relu and jumprelu coders without skip connections; export this one to saelens")
    return [_save(made, folder / f"layer_{made.layer}" / WEIGHTS) for made in coders]


def _save(made: Plain, path: Path) -> Path:
    arrays = {"W_enc": made.W_enc.T, "b_enc": made.b_enc, "W_dec": made.W_dec[:, 0], "b_dec": made.b_dec}
    arrays |= {"threshold": made.threshold} if made.threshold is not None else {}

    def save(temporary: Path) -> None:
        with temporary.open("wb") as stream:  # a name without .npz would have it added
            np.savez(stream, allow_pickle=False, **{key: value.numpy() for key, value in arrays.items()})

    atomically(path, save)
    return path
