"""Every metric of the catalogue on a run and on its controls, on the same tokens: what a metric says of a decomposition that is junk."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from decomp_bench.conditions import upstream
from decomp_bench.config import Config, EvalConfig, TrainConfig
from decomp_bench.controls import (
    TIED,
    UNTRAINED,
    freeze_decoder,
    of_shuffled_activations,
    on_random_target,
    shifted_gates,
    with_frozen_decoder,
)
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.metrics import CATALOGUE
from decomp_bench.results import condition

REAL = "none"
Name = Literal["shifted gates", "shuffled activations", "frozen decoder", "random target"]


class ControlsConfig(Config):
    """Which controls, and what they are scored on."""

    controls: tuple[Name, ...] = ("shifted gates", "shuffled activations", "frozen decoder", "random target")
    protocol: Literal["cascading", "clean", "single"] = "cascading"
    split: Literal["validation", "test"] = "test"
    tokens: PositiveInt = 20_000
    batch: PositiveInt = 16
    bootstrap: PositiveInt = 2000
    seed: int = 0
    """Of the random target."""


def measure(decomposer: Decomposer, source: Source, config: ControlsConfig, progress: Progress) -> Rows:
    """Rows of every metric for the run (`control=none`) and each control; gates of the stream at hand, or else of the clean pass."""
    made: dict[str, Decomposer] = {REAL: decomposer}
    rows, parts = [], len(config.controls) + 2
    for number, name in enumerate(config.controls):
        one, where = _control(name, decomposer, source, config.seed)
        if isinstance(one, str):
            rows += [_row(name, key, {"value": math.nan, "reason": one, "gates": _gates(decomposer)}) for key in CATALOGUE]
        elif where is source:
            made[name] = one
        else:
            rows += _scored({name: one}, where, config)
        progress(number + 1, parts)
    rows += _scored(made, source, config)
    progress(parts, parts)
    return rows


def _control(name: Name, decomposer: Decomposer, source: Source, seed: int) -> tuple[Decomposer | str, Source]:
    """The control and what it is scored on; instead of a control the reason why there is none."""
    kind = type(decomposer)
    if name == "shifted gates":
        return shifted_gates(decomposer), source
    if name == "random target":
        where = on_random_target(source, seed)
        return _trained(_anew(kind, decomposer, where), where), where
    if not decomposer.trainable:
        return UNTRAINED, source
    if name == "shuffled activations":
        return _trained(_anew(of_shuffled_activations(kind), decomposer, source), source), source
    frozen = _anew(with_frozen_decoder(kind), decomposer, source)
    return (_trained(frozen, source) if freeze_decoder(frozen, source) else TIED), source


def _anew(kind: type[Decomposer], like: Decomposer, source: Source) -> Decomposer:
    return kind(like.config, source.target, like.layers, like.seed).to(source.target.device)


def _trained(decomposer: Decomposer, source: Source) -> Decomposer | str:
    """Trained to its end in a folder that is thrown away; what failed where training did."""
    from decomp_bench.train import Job, train

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(device=str(source.target.device), threads=torch.get_num_threads(), save_every=10**9)
        outcome = train([Job(decomposer, Path(folder))], source, config)[0]
    return outcome.error or decomposer.eval()


def _gates(decomposer: Decomposer) -> Literal["clean", "self"]:
    return "self" if upstream(decomposer) else "clean"


def _scored(made: dict[str, Decomposer], source: Source, config: ControlsConfig) -> list[dict[str, Any]]:
    """The rows over all layers and sites of a run and controls of it, as they were trained, over one clean pass."""
    from decomp_bench.evaluate import evaluate

    gates = _gates(next(iter(made.values())))
    shared = config.model_dump(include={"split", "tokens", "batch", "bootstrap"})
    wanted = EvalConfig(**shared, protocols=(config.protocol,), gates=(gates,), sweep=False)
    rows = []
    for name, evaluation in zip(made, evaluate(list(made.values()), source, wanted), strict=True):
        for row in evaluation.rows:
            whole = row["layer"] == row["site"] == "all" and row["mask"] == "binary" and row["delta"] == "off"
            if whole and row["curve"] == "trained" and row["gates"] == gates:
                rows.append(_row(name, row["metric"], row))
    return rows


def _row(name: str, key: str, row: dict[str, Any]) -> dict[str, Any]:
    about = CATALOGUE[key]
    return {"metric": key, "metric_version": about.version, **row, "condition": condition(control=name, better=about.direction)}


def _seconds(config: ControlsConfig) -> float:
    return 10 + (60 + config.tokens / 4500) * len(config.controls)


MEASUREMENT = Measurement(
    1,
    ControlsConfig,
    measure,
    tuple(Measured(m.key, m.title, m.unit, m.direction, m.formula, m.blind) for m in CATALOGUE.values()),
    _seconds,
)
