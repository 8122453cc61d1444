"""Rows about a target and its data alone: made once, kept in the cache folder, the same for every run that they come with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from filelock import FileLock

from decomp_bench.conditions import upstream
from decomp_bench.config import Config, digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.errors import UserError
from decomp_bench.files import write_json
from decomp_bench.measurements import Rows

OF_TARGET = {"run_id": "", "method": "baseline", "kind": "baseline", "gates": "self"}
"""Columns that say that a row is about no run."""


def once(
    name: str, version: int, source: Source, layers: tuple[int, ...], settings: Config, make: Callable[[], Iterable[dict[str, Any]]]
) -> Rows:
    """The baselines of a measurement for a target, its data, layers and settings; whoever comes while they are made waits for them."""
    key = digest([version, source.target.identity, source.hash, layers, settings.model_dump(mode="json")], 20)
    file = cache_dir() / name / f"{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError):
            write_json([OF_TARGET | row for row in make()], file)
    return json.loads(file.read_text())


def need_text(source: Source, what: str) -> None:
    """Raise UserError for a target without text."""
    if not source.target.is_lm or source.target.toy is not None:
        raise UserError(f"{what} needs text, and {source.target.uri} has none: take a language model such as pydocs-4l")


def own_gates(decomposer: Decomposer) -> str:
    """Where the gates of an intervention come from: the changed stream, unless they need what it has not reached."""
    return "self" if upstream(decomposer) else "clean"
