"""Autointerp: a language model explains components, and another (or the same) tells by the explanation when they are active.

It needs an endpoint that speaks the OpenAI chat protocol: `--set measure.autointerp.judge.model=NAME`, and judge.endpoint for another than
OpenAI's. What was asked and answered, the explanations, and what they cost stay in the cache folder's `autointerp`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from decomp_bench.concepts.pieces import Pieces
from decomp_bench.conditions import TRAINED, Condition, columns
from decomp_bench.config import digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.files import write_json
from decomp_bench.interpretability.autointerp import AutointerpConfig, Outcome, explained
from decomp_bench.interpretability.harvest import Place, harvest
from decomp_bench.interpretability.summing import each_row, mean_row, pool_rows
from decomp_bench.judge import Judge
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.measurements._baselines import need_text
from decomp_bench.results import condition

VERSION = 1
_KINDS = (
    ("detection", "Detection by an explanation", "balanced accuracy in telling active from inactive contexts; chance is 0.5"),
    ("fuzzing", "Fuzzing of an explanation", "balanced accuracy in telling rightly from wrongly marked active contexts; chance is 0.5"),
)
_BLIND = "what components write, which does not enter"
METRICS = (
    Measured("interpretability_pool", "Share that could be drawn", "", "none", "as in the measurement interpretability"),
    *(Measured(f"autointerp_{key}", title, "", "higher", formula, _BLIND) for key, title, formula in _KINDS),
    *(
        Measured(f"autointerp_{key}_gain", f"{title}, above another component's", "", "higher", "component by component", _BLIND)
        for key, title, _ in _KINDS
    ),
    Measured("autointerp_missing", "Missing replies", "", "lower", "share of the requests whose reply could not be had or read"),
)
WAYS = {"own": "component", "other": "random explanations"}
MISSING = "replies or examples of the others are missing"


def measure(decomposer: Decomposer, source: Source, config: AutointerpConfig, progress: Progress) -> Rows:
    """Rows of every place that the method has components at."""
    need_text(source, "autointerp")
    found = harvest(decomposer, source, config)
    about = {**columns(decomposer, Condition("clean", "clean", TRAINED)), "split": "test"}
    pieces = Pieces(source.target.tokenizer).of
    key = digest([VERSION, source.target.identity, source.hash, decomposer.family, about["variant"], decomposer.seed, config.model_dump()])
    log = cache_dir() / "autointerp" / f"{decomposer.name}-{key}.jsonl"
    judges = (Judge(config.explainer or config.judge, log), Judge(config.judge, log))
    made: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    for number, place in enumerate(found.places):
        made += pool_rows(place)
        if place.components:
            outcome = explained(found.fit, found.held, place.own, pieces, config, judges)
            made += _rows(place, outcome, config.bootstrap)
            kept[place.name] = {one.name: said for one, said in zip(place.components, outcome.explanations, strict=True)}
        progress(number + 1, len(found.places))
    write_json({"explanations": kept, "usage": [asdict(judge.usage) for judge in judges]}, log.with_suffix(".json"))
    return [about | row for row in made]


def _rows(place: Place, outcome: Outcome, bootstrap: int) -> Iterator[dict[str, Any]]:
    """Means and gains, each component, and which share of the replies is missing."""
    for (kind, whose), values in outcome.scores.items():
        label = {"form": place.name, "way": WAYS[whose]}
        yield mean_row(f"autointerp_{kind}", values, {**label, "at": "all"}, bootstrap, MISSING)
        yield from each_row(f"autointerp_{kind}", place.components, values, label)
        if whose == "own":
            gain = values - outcome.scores[kind, "other"]
            yield mean_row(f"autointerp_{kind}_gain", gain, {**label, "at": "all"}, bootstrap, MISSING)
    for (kind, whose), why in outcome.missing.items():
        asked = outcome.asked[kind, whose]
        where = condition(component="all", form=place.name, way=WAYS[whose], at=kind, over="components")
        share = len(why) / asked if asked else math.nan
        common = max(set(why), key=why.count) if why else ""
        about = {"condition": where, "lo": None, "hi": None, "n": asked, "reason": common}
        yield {"metric": "autointerp_missing", "value": share, **about}


def _seconds(config: AutointerpConfig) -> float:
    """From the requests, two seconds each, a few at a time, at two places."""
    requests = 2 * config.components * (1 + 2 * (1 + config.fuzzing))
    return 10 + 2 * requests / config.judge.concurrency


MEASUREMENT = Measurement(VERSION, AutointerpConfig, measure, METRICS, _seconds)
