"""Faithfulness of replacement MLPs: their Jacobians beside the original's, at sampled positions of held-out text or rows of a toy.

A decomposition that is given the MLP's output has no response of its own to the MLP's input, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from decomp_bench.bootstrap import resampled, spread
from decomp_bench.conditions import TRAINED, Condition, columns
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.interpretability.jacobian import QUANTITIES, JacobianConfig, Sums, layers_of, sums
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.results import condition

VERSION = 1
METRICS = (
    Measured(
        "jacobian_error", "Relative error of the Jacobian", "", "lower", "|J - J'| / |J|, Frobenius, sums over positions; 1 for J' = 0"
    ),
    Measured("jacobian_cosine", "Cosine of the Jacobian", "", "higher", "<J, J'> / (|J| |J'|), mean over positions"),
    Measured(
        "jacobian_gain",
        "Cosine of the Jacobian beyond another position's",
        "",
        "higher",
        "the cosine minus that with J' of another position of the row",
    ),
)
EACH = "mlp"
OTHER, TURNED = "random positions", "turned"
AUTOENCODING = "it is given the MLP's output, so that it has no response of its own to the MLP's input"


def measure(decomposer: Decomposer, source: Source, config: JacobianConfig, progress: Progress) -> Rows:
    """Rows over all layers and of each."""
    about = {**columns(decomposer, Condition("single", "clean", TRAINED)), "split": "test"}
    layers = layers_of(decomposer)
    if decomposer.kind == "autoencoding" or not layers:
        reason = AUTOENCODING if layers else "it replaces no MLP output"
        where = condition(**{EACH: "all"}, form="gates held", way="component", at="all", over="documents")
        missing = {"value": math.nan, "lo": None, "hi": None, "n": 0, "condition": where, "reason": reason}
        return [about | missing | {"metric": metric.key} for metric in METRICS]
    whole, done = len(layers) * -(-config.rows // config.batch), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, whole)

    return [about | row for row in _rows(sums(decomposer, source, config, tick), config.bootstrap)]


def _rows(found: Sums, bootstrap: int) -> Iterator[dict[str, Any]]:
    """Means over layers of figures of each layer, with intervals over documents, and each layer's; beside both controls."""
    documents = len(next(iter(found.by_layer.values())))
    weight = resampled(documents, bootstrap)
    by_layer = {layer: _figures(weight @ table) for layer, table in found.by_layer.items()}
    names = next(iter(by_layer.values())).keys()
    parts = {"all": {name: np.mean([one[name] for one in by_layer.values()], axis=0) for name in names}}
    parts |= {str(layer): one for layer, one in by_layer.items()}
    for part, figures in parts.items():
        for (metric, way), values in figures.items():
            where = condition(**{EACH: part}, form="gates held", way=way, at="all", over="documents")
            yield {"metric": metric, **spread(values, documents), "layer": part, "condition": where}


def _figures(table: Float[np.ndarray, "replicates q"]) -> dict[tuple[str, str], Float[np.ndarray, " replicates"]]:
    """(metric, way) -> its value in each resample of the documents."""
    of = dict(zip(QUANTITIES, table.T, strict=True))
    made = {}
    for way, product, cosine in (
        ("component", "both", "cosine"),
        (TURNED, "turned", "cosine_turned"),
        (OTHER, "elsewhere", "cosine_elsewhere"),
    ):
        made["jacobian_cosine", way] = of[cosine] / of["count"]
        if way != OTHER:
            made["jacobian_error", way] = np.sqrt(np.maximum(of["target"] + of["own"] - 2 * of[product], 0) / of["target"])
    made["jacobian_gain", "component"] = made["jacobian_cosine", "component"] - made["jacobian_cosine", OTHER]
    return made


def _seconds(config: JacobianConfig) -> float:
    """From the passes back through four layers, each of `batch` rows."""
    return 3 + 4 * -(-config.rows // config.batch) * config.probes * 0.03


MEASUREMENT = Measurement(VERSION, JacobianConfig, measure, METRICS, _seconds)
