"""Training, accepting and keeping toy targets: the same name gives the same weights on one machine, whatever its thread count."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor

from decomp_bench.checkpoint import write_tensors
from decomp_bench.config import digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.errors import UserError
from decomp_bench.files import write_json
from decomp_bench.targets.base import TOY_STREAM, TargetModel
from decomp_bench.targets.toys import TOYS
from decomp_bench.targets.toys.hierarchy import Hierarchy
from decomp_bench.targets.toys.induction import Induction
from decomp_bench.targets.toys.resid import Resid
from decomp_bench.targets.toys.synth import Synth
from decomp_bench.targets.toys.tms import TMS
from decomp_bench.targets.toys.two_hop import TwoHop

Progress = Callable[[int, int], None]
VERSION = 1
"""Raised whenever a recipe's code gives other weights, so that kept ones are not taken for current."""


@runtime_checkable
class Recipe(Protocol):
    """How a toy is trained and built: a frozen dataclass whose fields decide the weights, with the seed."""

    def train(self, seed: int, progress: Progress) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, and the figures of the gate with its verdict as `accepted`."""
        ...

    def build(self, weights: dict[str, Tensor], uri: str, device: str | torch.device) -> TargetModel:
        """The target with these weights."""
        ...

    def verdict(self, figures: dict[str, Any]) -> str:
        """What a rejected training came to, as the predicate of a sentence."""
        ...


_SMALL, _LARGE = TMS(5, 2, batch=1024, bias_zero=False), TMS(40, 10, batch=8192, bias_zero=True)
RECIPES: dict[str, Recipe] = {
    "tms_5-2": _SMALL,
    "tms_5-2-id": dataclasses.replace(_SMALL, identity=True),
    "tms_40-10": _LARGE,
    "tms_40-10-id": dataclasses.replace(_LARGE, identity=True),
    "resid_mlp_1l": Resid(100, 1, 50, steps=1000),
    "resid_mlp_2l": Resid(100, 2, 25, steps=1000),
    "resid_mlp_3l": Resid(102, 3, 17, steps=10_000),
    "ih": Induction(),
    "two_hop": TwoHop(),
    "hierarchy": Hierarchy(),
    "synth_1k": Synth(),
    "synth_16k": Synth(16_384, 768, 128, rows=4_194_304),
}
TRAINED_AS = {"tms_5-2-id": "tms_5-2", "tms_40-10-id": "tms_40-10"}
"""A fixed identity changes nothing in training, so these share their weights."""


def train_toy(name: str, seed: int, progress: Progress = lambda _done, _steps: None) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of a toy, trained where it is not in the cache yet; a rejected training is kept too, and says so.

    The folder holds weights.safetensors and manifest.json: name, seed, recipe, the gate's `figures` and `accepted`, seconds, versions.
    Raises UserError for an unknown name.
    """
    _recipe(name)
    name = TRAINED_AS.get(name, name)
    recipe, folder = _recipe(name), _folder(name, seed)
    if (manifest := _kept(folder)) is not None:
        return folder, manifest
    threads, began = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            weights, figures = recipe.train(seed, progress)
    finally:
        torch.set_num_threads(threads)
    accepted = bool(figures.pop("accepted"))
    manifest = {
        "name": name,
        "seed": seed,
        "accepted": accepted,
        "figures": figures,
        "recipe": dataclasses.asdict(recipe),  # type: ignore[call-overload]
        "torch": torch.__version__,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    write_tensors(weights, folder / "weights.safetensors")
    write_json(manifest, folder / "manifest.json")
    return folder, manifest


def accepted_seeds(name: str) -> tuple[int, ...]:
    """Seeds known to give the published solution: those on record, and those that were trained and accepted here."""
    _recipe(name)
    name, here = TRAINED_AS.get(name, name), []
    for file in (cache_dir() / "toys").glob(f"{name}@*/manifest.json"):
        manifest = _kept(file.parent)
        if manifest is not None and manifest["accepted"] and file.parent == _folder(name, manifest["seed"]):
            here.append(manifest["seed"])
    rejected = {seed for seed in TOYS[name].seeds if (kept := _kept(_folder(name, seed))) is not None and not kept["accepted"]}
    return tuple(dict.fromkeys(seed for seed in (*TOYS[name].seeds, *sorted(here)) if seed not in rejected))


def load_known(name: str, seed: int | None, uri: str, device: str | torch.device) -> TargetModel:
    """A toy by name and seed (None: the first accepted one), trained on first use; raises UserError for a seed that the gate rejects."""
    recipe = _recipe(name)
    seeds = accepted_seeds(name)
    seed = seed if seed is not None else (seeds or TOYS[name].seeds)[0]
    folder, manifest = train_toy(name, seed)
    if not manifest["accepted"]:
        raise UserError(rejection(name, manifest))
    target = recipe.build(load_file(folder / "weights.safetensors"), uri, device)
    target.about |= {"seed": seed, **manifest["figures"]}
    target.apart = 0 if isinstance(recipe, Synth) else TOY_STREAM  # a synthetic world is itself drawn apart
    return target


def rejection(name: str, manifest: dict[str, Any]) -> str:
    """What a rejected training came to, and what to do: one line."""
    others = ", ".join(f"toy:{name}@{other}" for other in accepted_seeds(name)) or "none yet"
    fix = f"take an accepted seed ({others}), or try one: decomp-bench target train toy:{name}@SEED"
    return f"toy:{name}@{manifest['seed']} {_recipe(name).verdict(manifest['figures'])}: {fix}"


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        from decomp_bench.registry import suggest

        raise UserError(f"unknown toy '{name}'; {suggest(name, list(RECIPES))}")
    return RECIPES[name]


def _folder(name: str, seed: int) -> Path:
    key = digest([dataclasses.asdict(_recipe(name)), torch.__version__, VERSION], 12)  # type: ignore[call-overload]
    return cache_dir() / "toys" / f"{name}@{seed}-{key}"


def _kept(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that is whole; None where it is absent or broken, and is made again."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        load_file(folder / "weights.safetensors")
    except Exception:
        return None
    return manifest if re.fullmatch(rf"{re.escape(str(manifest.get('name')))}@{manifest.get('seed')}-\w+", folder.name) else None
