"""Ablation of the components that tell a topic: what the target loses on the topic and on other text, and at equal damage to other text.

Selectivity is dCE_on / (dCE_on + |dCE_off|), a gain on the topic counted as no loss: it lies in [0, 1]. Since few strong components and
many weak ones damage other text differently, decompositions are compared at equal damage there, by interpolation along the number of
ablated components, with the mean of random components of the same sites and activity beside them. Baselines (difference in means and
random directions, projected out of the MLP outputs) depend on the target alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from decomp_bench import directions
from decomp_bench.bootstrap import interval, spread
from decomp_bench.concepts import Concept, concepts_of
from decomp_bench.concepts.sample import SPLIT, Sample, draw
from decomp_bench.conditions import Condition, columns
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.forms import everything_on
from decomp_bench.intervene import Components, one
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.measurements._baselines import need_text, once, own_gates
from decomp_bench.results import condition
from decomp_bench.selection import Scores, best, components, controls, scores
from decomp_bench.topic_ablation import AblationConfig, Resamples, at_damage, losses, selectivity

VERSION = 1
FEWEST_DOCUMENTS = 2
_SELECTED = "random directions selected alike, which have a share of it (experiment 014): read it beside theirs"
METRICS = (
    Measured(
        "ablation_on",
        "Loss on the topic",
        "nats/token",
        "higher",
        "rise of CE on text of the concept, by number of components",
        "removing everything",
    ),
    Measured(
        "ablation_off",
        "Loss on other text",
        "nats/token",
        "lower",
        "rise of CE on other text, by number of components",
        "removing nothing",
    ),
    Measured("ablation_selectivity", "Selectivity", "", "higher", "max(on, 0) / (max(on, 0) + |off|)", _SELECTED),
    Measured(
        "ablation_on_at_damage",
        "Loss on the topic at equal damage",
        "nats/token",
        "higher",
        "on, where |off| first reaches a damage",
        _SELECTED,
    ),
    Measured(
        "ablation_selectivity_at_damage",
        "Selectivity at equal damage",
        "",
        "higher",
        "selectivity where |off| reaches a damage",
        _SELECTED,
    ),
    Measured(
        "ablation_gain",
        "Loss on the topic above random",
        "nats/token",
        "higher",
        "on at a damage minus the mean of random controls'",
        _SELECTED,
    ),
)
ABOUT = {"protocol": "cascading", "split": SPLIT["C"]}


@dataclass(frozen=True)
class Ground:
    """What every ablation meets alike: texts that select, held-out texts of each concept, resamples of their documents."""

    config: AblationConfig
    concepts: list[Concept]
    select: Sample
    held_out: list[Sample]
    resamples: Resamples

    def lacking(self, c: int) -> str:
        """Why a concept cannot be measured, empty where it can."""
        sample = self.held_out[c]
        held = sample.tokens[:, 1:, 0].any(1).numpy()
        if len(np.unique(sample.documents[held])) < FEWEST_DOCUMENTS:
            return "fewer than two held-out documents of the concept"
        whole = sample.topic[:, 0].numpy() if self.concepts[c].of_documents else np.zeros(len(held), bool)
        if len(np.unique(sample.documents[~whole])) < FEWEST_DOCUMENTS:
            return "fewer than two held-out documents without the concept"
        return "" if self.select.tokens[..., c].any() else "no text of the concept to select components on"


def measure(decomposer: Decomposer, source: Source, config: AblationConfig, progress: Progress) -> Rows:
    """Rows of baselines, of a decomposition's components, and of random ones."""
    need_text(source, "ablation")
    met = _met(source, config.model_dump_json())
    whole, choice = everything_on(decomposer)
    usable = [c for c in range(len(met.concepts)) if not met.lacking(c)]
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, 2 * len(usable))

    def made() -> Iterator[dict[str, Any]]:
        yield from (ABOUT | row for row in (*_left_out(met), *_measure_baselines(met, usable, decomposer.layers, tick)))

    rows = once("topic_ablation", VERSION, source, decomposer.layers, config, made)
    done, gates = len(usable), own_gates(whole)
    about = ABOUT | {"gates": gates, "variant": columns(whole, Condition("cascading", gates, choice))["variant"]}
    table = Table(met, {"form": "zero", "way": "component"}, {"form": "zero", "way": "random components"})
    found = scores(whole, met.select) if usable else {}
    for c in usable:
        own, drawn = _components(found, c, config)
        rows += [about | row for row in table.add(whole, c, own, [(whole, counted) for counted in drawn])]
        tick()
    return rows + [about | row for row in table.summary()]


@lru_cache(maxsize=1)
def _met(source: Source, settings: str) -> Ground:
    """What all runs of a worker meet alike, made once."""
    config = AblationConfig.model_validate_json(settings)
    concepts = concepts_of(source.name, config.concepts)
    concepts = concepts if config.concepts else [c for c in concepts if c.of_documents] or concepts
    held_out = [draw(source, "C", [concept], config.off_rows, config.on_rows, config.seed) for concept in concepts]
    documents = np.unique(np.concatenate([sample.documents for sample in held_out]))
    labels = source.rows(SPLIT["C"]).labels
    topics = np.array([[concept.in_label(labels[doc]) for concept in concepts] for doc in documents])
    select = draw(source, "A", concepts, config.general, config.positive, config.seed)
    return Ground(config, concepts, select, held_out, Resamples.of(documents, topics, config.bootstrap))


Counted = Mapping[int, Components]
"""Number of ablated components -> which."""


def _components(found: Scores, c: int, config: AblationConfig) -> tuple[Counted, list[Counted]]:
    """The components that tell a concept best, and draws of random ones of their sites that are as often active."""
    ranked = best(found, c, max(*config.counts, *config.control_counts))
    own = {count: components(ranked[:count]) for count in config.counts if count <= len(ranked)}
    drawn = []
    for number in range(config.controls):
        random = controls(found, ranked[: max(config.control_counts)], c, np.random.default_rng([config.seed, c, number]))
        drawn.append({count: components(random[:count]) for count in config.control_counts if count <= len(random)})
    return own, drawn


@dataclass
class Curve:
    """dCE on and off a concept [counts, replicates], by number of ablated components."""

    counts: list[int]
    on: np.ndarray
    off: np.ndarray

    def at(self, damage: float) -> np.ndarray:
        """dCE on the concept at a damage elsewhere [replicates]."""
        return at_damage(self.on, self.off, damage)


class Table:
    """Curves of one way to ablate, concept by concept, beside its random controls, and the rows that they come to."""

    def __init__(self, met: Ground, own: dict[str, Any], control: dict[str, Any]) -> None:
        self.met, self.labels = met, (own, control)
        self.on: dict[tuple[int, float], list[np.ndarray]] = {}
        """(own or control, damage) -> dCE on the concept [replicates] of every concept; NaN where the damage is not reached."""

    def add(self, decomposer: Decomposer, c: int, own: Counted, drawn: Sequence[tuple[Decomposer, Counted]]) -> Iterator[dict[str, Any]]:
        """Measure a concept's ablations; yields its rows."""
        curve = self._curve(decomposer, c, own)
        random = [self._curve(bank, c, counted) for bank, counted in drawn]
        name = {"concept": self.met.concepts[c].name}
        documents = len(np.unique(self.met.held_out[c].documents))
        for label, curves in zip(self.labels, ([curve], random), strict=True):
            yield from self._by_count(name | label, curves, documents)
        for damage in self.met.config.damages:
            yield from self._at(damage, name, curve, random, documents)

    def _curve(self, decomposer: Decomposer, c: int, counted: Counted) -> Curve:
        rises = self.met.resamples.rises(losses(decomposer, self.met.held_out[c], 0, list(counted.values())))
        return Curve(list(counted), rises[:, 0], rises[:, 1])

    def _by_count(self, label: dict[str, Any], curves: Sequence[Curve], documents: int) -> Iterator[dict[str, Any]]:
        for i, count in enumerate(curves[0].counts):
            on, off = (np.mean([getattr(curve, side)[i] for curve in curves], axis=0) for side in ("on", "off"))
            values = {"on": on, "off": off, "selectivity": np.mean([selectivity(curve.on[i], curve.off[i]) for curve in curves], axis=0)}
            for key, value in values.items():
                yield {"metric": f"ablation_{key}", **spread(value, documents), "condition": condition(**label, count=count)}

    def _at(self, damage: float, name: dict[str, Any], curve: Curve, random: Sequence[Curve], documents: int) -> Iterator[dict[str, Any]]:
        drawn = [one_of.at(damage) for one_of in random]
        reached = sum(math.isfinite(one_of[0]) for one_of in drawn)
        pair = (curve.at(damage), np.mean(drawn, axis=0))
        reasons = ("this much damage was not reached", f"this much damage was reached by {reached} of {len(drawn)} draws")
        for place, (label, on, reason) in enumerate(zip(self.labels, pair, reasons, strict=True)):
            self.on.setdefault((place, damage), []).append(on)
            about = {"condition": condition(**name, **label, damage=damage), "n": documents}
            for key, value in (("on", on), ("selectivity", selectivity(on, np.full_like(on, damage)))):
                yield {"metric": f"ablation_{key}_at_damage", **_explained(value, reason), **about}
        gain = pair[0] - pair[1]
        lacking = [reason for on, reason in zip(pair, reasons, strict=True) if not math.isfinite(on[0])]
        about = {"condition": condition(**name, **self.labels[0], damage=damage), "n": documents}
        yield {"metric": "ablation_gain", **_explained(gain, "; ".join(lacking)), **about}

    def summary(self) -> Iterator[dict[str, Any]]:
        """Means over the concepts where a damage was reached, with intervals over documents and over concepts."""
        for damage in self.met.config.damages if self.on else ():
            own, control = (np.stack(self.on[place, damage]) for place in (0, 1))
            values = []
            for label, on in zip(self.labels, (own, control), strict=True):
                values.append(("ablation_on_at_damage", label, on))
                values.append(("ablation_selectivity_at_damage", label, selectivity(on, np.full_like(on, damage))))
            for metric, label, on in (*values, ("ablation_gain", self.labels[0], own - control)):
                yield from self._over(metric, label, on, damage)

    def _over(self, metric: str, label: dict[str, Any], values: np.ndarray, damage: float) -> Iterator[dict[str, Any]]:
        """Rows of values [concepts, replicates]."""
        there = values[np.isfinite(values[:, 0])]
        n, whole = len(there), len(values)
        reason = "" if n == whole else f"{n} of {whole} concepts: the others do not reach this damage"
        summed = spread(there.mean(0), len(self.met.resamples.document)) if n else interval(there[:, 0], 1)
        for over, row in (("concepts", interval(there[:, 0], self.met.config.bootstrap)), ("documents", summed)):
            about = {"condition": condition(concept="all", **label, damage=damage, over=over), "reason": reason}
            yield {"metric": metric, **row, **about}


def _explained(values: np.ndarray, reason: str) -> dict[str, Any]:
    """Value and interval of values [replicates] at a damage, and why one of them is missing."""
    row = spread(values, 0)
    if math.isfinite(row["value"]):
        reason = "" if math.isfinite(row["lo"]) else "no interval: resamples do not reach this damage"
    return row | {"reason": reason}


# ---- what depends on the target alone


def _left_out(met: Ground) -> Iterator[dict[str, Any]]:
    for c, concept in enumerate(met.concepts):
        if met.lacking(c):
            about = {"family": "concept", "condition": condition(concept=concept.name, sort=concept.kind)}
            yield about | {"metric": "ablation_selectivity", "value": math.nan, "lo": None, "hi": None, "n": 0, "reason": met.lacking(c)}


def _measure_baselines(met: Ground, usable: list[int], layers: tuple[int, ...], tick: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """A direction projected out of the MLP outputs of the first, first two, ... layers: difference in means, and random ones."""
    if not usable:
        return
    outputs, _, held = directions.outputs(met.select, layers)
    target, config = met.select.source.target, met.config
    means = {layer: y.mean(0) for layer, y in outputs.items()}
    about = {"family": "difference in means"}
    table = Table(met, {"form": "projection", "way": "baseline"}, {"form": "projection", "way": "random directions"})
    for c in usable:
        told = {layer: directions.mean_difference(y, held[:, c])[None] for layer, y in outputs.items()}
        generator = torch.Generator().manual_seed(config.seed + c)
        drawn = [{layer: torch.randn(1, len(mean), generator=generator) for layer, mean in means.items()} for _ in range(config.controls)]
        banks = [directions.Directions.of(target, vectors, means) for vectors in (told, *drawn)]
        names = [site.name for site in banks[0].sites]
        counted = {n: {name: one(name, 0)[name] for name in names[:n]} for n in range(1, len(names) + 1)}
        yield from (about | row for row in table.add(banks[0], c, counted, [(bank, counted) for bank in banks[1:]]))
        tick()
    yield from (about | row for row in table.summary())


def _seconds(config: AblationConfig) -> float:
    """From the passes that are made, at 9000 tokens a second; fourteen concepts where none are named."""
    rows = config.off_rows + config.on_rows
    passes = len(config.counts) + config.controls * len(config.control_counts)
    return 10 + passes * rows * 256 / 9000 * (len(config.concepts) or 14)


MEASUREMENT = Measurement(VERSION, AblationConfig, measure, METRICS, _seconds)
