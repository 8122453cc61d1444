"""What steering and ablation compare: trained runs and floors, each with the forms in which its components can be changed; tidy rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from decomp_bench.bootstrap import resampled
from decomp_bench.decomposer import Decomposer, layer_of
from decomp_bench.intervene import Kind
from decomp_bench.runs import Run
from decomp_bench.targets.base import TargetModel

COLUMNS = {
    "concept": "what is steered to or ablated",
    "kind": "topic, lexicon or token",
    "method": "family of the decomposition, or the baseline",
    "run": "id of the run, empty for a baseline",
    "form": "how the component is changed, or which control it is",
    "site": "site of the first component",
    "component": "its index, -1 where there is none",
    "factor": "|dy| / |y| of a steering, number of prefix tokens of a prompt, number of ablated components",
    "split": "fold: A selects, B chooses the factor, C scores",
    "chosen": "whether the factor is the one chosen on B",
    "metric": "what is measured",
    "value": "the value, NaN where there is none",
    "lo": "lower end of the 95% bootstrap interval over documents",
    "hi": "upper end",
    "n": "documents",
    "reason": "why there is no value",
}


@dataclass(frozen=True)
class Contender:
    """A decomposition to be steered or ablated with."""

    name: str
    run: str
    decomposer: Decomposer

    @staticmethod
    def of(run: Run, target: TargetModel) -> Contender:
        """A run's; one that was not trained is taken with all its components on, since its sparsity is chosen at inference."""
        found = run.load(target)
        return Contender(f"{found.family} {found.variant}".strip(), run.id, found).everything_on()

    def everything_on(self) -> Contender:
        """The same, with all components on where nothing was trained."""
        own = self.decomposer
        choices = [] if own.trainable else own.sweep()
        return Contender(own.family, self.run, own.at(**vars(choices[-1]))) if choices else self


@dataclass(frozen=True)
class Form:
    """A way to change components: the kind of intervention, the sites it is for, and whether only their own layer is written to."""

    name: str
    kind: Kind
    sites: tuple[str, ...]
    source_only: bool = False


def forms(decomposer: Decomposer) -> Iterator[Form]:
    """Components of matrices write linearly at the MLP's last map, or are opened by their own gates anywhere; others add what they write,
    those with several writes also at their own layer alone."""
    target, sites = decomposer.target, decomposer.sites
    of_maps = [site for site in sites if any(slot.write in target.map_paths for slot in site.slots)]
    last = [site for site in of_maps if any(slot.write.endswith(".mlp.down") for slot in site.slots)]
    rest = [site for site in sites if site not in of_maps]
    if last:
        yield Form("linear write", "add", tuple(site.name for site in last))
    if of_maps:
        yield Form("own gate", "open", tuple(site.name for site in of_maps))
    if rest:
        yield Form("write", "add", tuple(site.name for site in rest))
    if any(len({layer_of(slot.write) for slot in site.slots}) > 1 for site in rest):
        yield Form("write, source layer", "add", tuple(site.name for site in rest), source_only=True)


def interval(values: np.ndarray, weights: np.ndarray | None = None, replicates: int = 1000) -> dict[str, Any]:
    """Mean of one value a document, with its bootstrap interval; NaN throughout where there are none."""
    if not len(values):
        return {"value": math.nan, "lo": math.nan, "hi": math.nan, "n": 0}
    weights = resampled(len(values), replicates) if weights is None else weights
    return spread((weights @ values) / weights.sum(1), len(values))


def spread(replicates: np.ndarray, n: int) -> dict[str, Any]:
    """A value (the first) and the interval of its resamples (the others)."""
    rest = replicates[1:][np.isfinite(replicates[1:])]
    lo, hi = np.quantile(rest, [0.025, 0.975]) if len(rest) else (math.nan, math.nan)
    return {"value": float(replicates[0]), "lo": float(lo), "hi": float(hi), "n": n}


def tidy(rows: Iterable[dict[str, Any]]) -> Any:
    """Rows as a frame with every column of `COLUMNS`; raises KeyError for another."""
    import pandas as pd

    rows = list(rows)
    unknown = {key for row in rows for key in row} - COLUMNS.keys()
    if unknown:
        raise KeyError(f"no column {', '.join(sorted(unknown))}")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    empty = {"run": "", "form": "", "site": "", "component": -1, "chosen": False, "reason": ""}
    return frame.fillna(empty).astype({"component": "int64", "chosen": "bool", "factor": "float64", "value": "float64"})
