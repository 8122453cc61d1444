"""Steering by a decomposition's components: concept, fluency and their harmonic mean, beside random components and baselines.

For each concept whose detector is good enough, the component of highest AUROC on fold A is pushed by each factor |dy| / |y|; the factor
that scores best on fold B is the one that counts, and fold C gives the numbers. Random components of the same site and activity go through
the same, each with its own choice of the factor, and what counts against them is the paired difference from their mean. Baselines
(difference in means, probe, ReFT-r1, a prompt's prefix, no steering) depend on the target alone. Protocol after AxBench (Wu et al. 2025,
arXiv 2501.17148), with programs as judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from decomp_bench import directions
from decomp_bench.bootstrap import interval
from decomp_bench.concepts import Concept, concepts_of
from decomp_bench.conditions import Condition, columns
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.forms import everything_on, forms
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.measurements._baselines import need_text, once, own_gates
from decomp_bench.results import condition
from decomp_bench.selection import scores
from decomp_bench.steerers import Steerer, component_steerers, direction_steerers
from decomp_bench.steering import Ground, Outcome, SteeringConfig, Texts, chosen, ground, prompted, steered, unsteered

VERSION = 1
METRICS = (
    Measured(
        "steering_concept",
        "Concept in steered text",
        "",
        "higher",
        "detector's score minus the unsteered texts' mean, at least 0",
        "text broken into the concept's words",
    ),
    Measured(
        "steering_fluency",
        "Fluency of steered text",
        "",
        "higher",
        "exp(-rise of NLL under the clean model / spread) * variety",
        "steering that does nothing",
    ),
    Measured("steering_score", "Steering score", "", "higher", "harmonic mean of concept and fluency of each text, mean over texts"),
    Measured("steering_gain", "Steering score above random", "", "higher", "score minus the mean score of random controls, by prompt"),
    Measured("steering_factor", "Chosen factor", "", "none", "|dy| / |y| (or tokens of a prefix) whose score on fold B is best"),
    Measured(
        "selection_auroc",
        "AUROC of the selected component",
        "",
        "higher",
        "P(larger where the concept holds) on fold A, ties half",
        "what components write, which does not enter",
    ),
    Measured("detector_auroc", "AUROC of the concept's detector", "", "higher", "on texts of fold D's documents that it was not made from"),
)
SCORES = ("concept", "fluency", "score")


def measure(decomposer: Decomposer, source: Source, config: SteeringConfig, progress: Progress) -> Rows:
    """Rows of baselines and of every form in which the components of a decomposition are pushed."""
    need_text(source, "steering")
    concepts, met = _met(source, config.model_dump_json())
    usable = [c for c, detector in enumerate(met.detectors) if detector.auroc >= config.detector]
    whole, choice = everything_on(decomposer)
    ways = list(forms(whole))
    each = (1 + config.controls) * len(config.factors)
    total, done = len(usable) * (each * len(ways) + (3 + config.controls) * len(config.factors)), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    def made() -> Iterator[dict[str, Any]]:
        yield from _detectors(met, concepts)
        yield from _measure_baselines(met, concepts, usable, decomposer.layers, tick)

    rows = once("steering", VERSION, source, decomposer.layers, config, made)
    done = total - len(usable) * each * len(ways)
    found = scores(whole, met.sample) if usable else {}
    gates = own_gates(whole)
    about = {"variant": columns(whole, Condition("cascading", gates, choice))["variant"], "gates": gates}
    for form in ways:
        table = Table(met, {"form": form.name, "way": "component"}, {"form": form.name, "way": "random components"})
        for c in usable:
            own, drawn = component_steerers(whole, found, form, c, met)
            outcomes = [steered(way.decomposer, way.intervention, met, c, tick) for way in drawn]
            rows += [about | row for row in table.add(concepts[c], c, _run(own, met, c, tick), outcomes, own)]
        rows += [about | row for row in table.summary()]
    return [{"protocol": "cascading", "split": "test", **row} for row in rows]


def _run(way: Steerer | None, met: Ground, c: int, tick: Callable[[], None]) -> Outcome:
    return steered(way.decomposer, way.intervention, met, c, tick) if way else {}


@lru_cache(maxsize=1)
def _met(source: Source, settings: str) -> tuple[list[Concept], Ground]:
    """What all runs of a worker meet alike, made once."""
    config = SteeringConfig.model_validate_json(settings)
    concepts = concepts_of(source.name, config.concepts)
    return concepts, ground(source, config, concepts)


class Table:
    """Outcomes of one way to steer, concept by concept, beside its random controls, and the rows that they come to.

    A way that is not there, or that no amount brings to any factor, leaves the text unsteered, and is scored so.
    """

    def __init__(self, met: Ground, own: dict[str, Any], control: dict[str, Any] | None = None) -> None:
        self.met, self.labels = met, [label for label in (own, control) if label is not None]
        self.at_chosen: list[list[dict[str, np.ndarray]]] = []
        self.at_factor: list[list[dict[float, dict[str, np.ndarray]]]] = []

    def add(self, concept: Concept, c: int, outcome: Outcome, drawn: Sequence[Outcome] = (), way: Steerer | None = None) -> Iterator[dict]:
        """Take a concept's outcomes; yields its rows."""
        plain = unsteered(self.met, c)
        ways = [[outcome], drawn or [{}]][: len(self.labels)]
        self.at_chosen.append([_mean([_on_c(self.met, self._counted(one, plain)) for one in some]) for some in ways])
        self.at_factor.append([_by_factor(self.met, some) for some in ways])
        name, n = {"concept": concept.name}, self.met.config.bootstrap
        if way is not None:
            place = {"layer": str(way.layer), "site": way.site, "split": "train", "n": len(self.met.sample.index), "lo": None, "hi": None}
            which = condition(**name, **self.labels[0], component=way.component)
            yield {"metric": "selection_auroc", "value": way.auroc, "condition": which, **place}
        factor = chosen(outcome, self.met)
        reason = "" if outcome else "nothing reaches any factor: counted as unsteered"
        about = {
            "condition": condition(**name, **self.labels[0]),
            "split": "validation",
            "n": int((~self.met.scored).sum()),
            "reason": reason,
        }
        yield {"metric": "steering_factor", "value": factor, "lo": None, "hi": None, **about}
        for label, best, by_factor in zip(self.labels, self.at_chosen[-1], self.at_factor[-1], strict=True):
            for factor, values in by_factor.items():
                yield from _rows({**name, **label, "factor": factor}, values, n)
            yield from _rows({**name, **label, "factor": "chosen"}, best, n, reason if label is self.labels[0] else "")
        if len(ways) > 1:
            own, control = self.at_chosen[-1]
            gain = interval(own["score"] - control["score"], n)
            yield {"metric": "steering_gain", **gain, "condition": condition(**name, **self.labels[0], factor="chosen")}

    def _counted(self, outcome: Outcome, plain: Texts) -> Texts:
        return outcome[chosen(outcome, self.met)] if outcome else plain

    def summary(self) -> Iterator[dict[str, Any]]:
        """Rows over all concepts: at the chosen factors with intervals over concepts and over prompts, at each factor over prompts."""
        for place, label in enumerate(self.labels if self.at_chosen else ()):
            whole = {name: np.stack([ways[place][name] for ways in self.at_chosen]) for name in SCORES}
            for over in ("concepts", "prompts"):
                for name in SCORES:
                    yield self._over(f"steering_{name}", whole[name], label, over, "chosen")
            for factor in self.met.config.factors if "prefix" not in label.values() else self.met.config.prefixes:
                there = [ways[place][factor] for ways in self.at_factor if factor in ways[place]]
                for name in SCORES if there else ():
                    yield self._over(f"steering_{name}", np.stack([one[name] for one in there]), label, "prompts", float(factor))
        if self.at_chosen and len(self.labels) > 1:
            gain = np.stack([own["score"] - control["score"] for own, control in self.at_chosen])
            yield from (self._over("steering_gain", gain, self.labels[0], over, "chosen") for over in ("concepts", "prompts"))

    def _over(self, metric: str, values: np.ndarray, label: dict[str, Any], over: str, factor: Any) -> dict[str, Any]:
        """Mean of values [concepts, prompts] with the interval over one of them."""
        each = values.mean(1) if over == "concepts" else values.mean(0)
        about = {"condition": condition(concept="all", **label, factor=factor, over=over)}
        return {"metric": metric, **interval(each, self.met.config.bootstrap), **about}


def _on_c(met: Ground, texts: Texts) -> dict[str, np.ndarray]:
    return {name: getattr(texts, name)[met.scored] for name in SCORES}


def _mean(draws: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([draw[name] for draw in draws], axis=0) for name in SCORES}


def _by_factor(met: Ground, outcomes: Sequence[Outcome]) -> dict[float, dict[str, np.ndarray]]:
    """At each factor that all of some ways reach, their mean on fold C."""
    shared = [factor for factor in (outcomes[0] if outcomes else ()) if all(factor in one for one in outcomes)]
    return {factor: _mean([_on_c(met, one[factor]) for one in outcomes]) for factor in shared}


def _rows(label: dict[str, Any], values: dict[str, np.ndarray], bootstrap: int, reason: str = "") -> Iterator[dict[str, Any]]:
    for name in SCORES:
        yield {"metric": f"steering_{name}", **interval(values[name], bootstrap), "condition": condition(**label), "reason": reason}


# ---- what depends on the target alone


def _about(family: str) -> dict[str, Any]:
    return {"family": family}


def _detectors(met: Ground, concepts: Sequence[Concept]) -> Iterator[dict[str, Any]]:
    """How good every detector is, and which concepts are left out for that."""
    for concept, detector in zip(concepts, met.detectors, strict=True):
        about = _about("detector") | {"condition": condition(concept=concept.name, sort=concept.kind), "n": detector.texts}
        row = about | {"metric": "detector_auroc", "value": detector.auroc, "lo": detector.lo, "hi": detector.hi, "split": "train"}
        if detector.by_definition:
            row |= {"applicable": "trivial", "reason": "the detector is the concept's definition"}
        yield row
        if not detector.auroc >= met.config.detector:
            figure = f"{detector.auroc:.3f}" if detector.auroc == detector.auroc else "not defined: too few texts of the concept"
            why = f"left out: its detector's AUROC is {figure}, and {met.config.detector:g} is asked for"
            yield about | {"metric": "steering_score", "value": float("nan"), "lo": None, "hi": None, "reason": why}


def _measure_baselines(
    met: Ground, concepts: Sequence[Concept], usable: list[int], layers: tuple[int, ...], tick: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    fitted = directions.outputs(met.sample, layers) if usable else ({}, torch.empty(0), torch.empty(0))
    names = ("difference in means", "probe", "ReFT-r1")
    tables = {
        name: Table(met, {"form": "direction", "way": "baseline"}, {"form": "direction", "way": "random directions"}) for name in names
    }
    prefix = Table(met, {"form": "prefix", "way": "baseline"})
    none = Table(met, {"form": "none", "way": "baseline"})
    for c in usable:
        ways, drawn = direction_steerers(met, fitted, c)
        random = [steered(way.decomposer, way.intervention, met, c, tick) for way in drawn]
        by_name = {way.name: way for way in ways}
        for name, table in tables.items():
            way = by_name.get(name)
            yield from (_about(name) | row for row in table.add(concepts[c], c, _run(way, met, c, tick), random, way))
        yield from (_about("prompt") | row for row in prefix.add(concepts[c], c, prompted(met, c)))
        yield from (_about("no steering") | row for row in none.add(concepts[c], c, {0.0: unsteered(met, c)}))
    for name, table in (*tables.items(), ("prompt", prefix), ("no steering", none)):
        yield from (_about(name) | row for row in table.summary())


def _seconds(config: SteeringConfig) -> float:
    """From the texts that are generated, 0.6 s for 48 of 40 tokens: two forms, a share of the baselines, thirty concepts unless named."""
    texts = 2 * config.prompts * config.length / 1920
    ways = 2 * (1 + config.controls) + 2
    return 10 + 0.6 * texts * len(config.factors) * ways * (len(config.concepts) or 30)


MEASUREMENT = Measurement(VERSION, SteeringConfig, measure, METRICS, _seconds)
