"""Proxies of interpretability: rules, intruders and purity of contexts, beside random directions that are as dense.

They measure how well contexts predict activity under a fixed local model class, and not what a person understands. Components are drawn by
one rule for every method, over strata of density; what they are compared with is as dense.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from decomp_bench.concepts.sample import draw
from decomp_bench.conditions import TRAINED, Condition, columns
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.interpretability.harvest import Text, harvest
from decomp_bench.interpretability.proxies import BANDED, ProxyConfig, Tools, score
from decomp_bench.interpretability.summing import pool_rows, rows
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.measurements._baselines import need_text

VERSION = 1
_TITLES = (
    (
        "rule_auroc",
        "AUROC of a small rule",
        "a rule of a few token literals from fold A, on fold C; half of what is inactive are near misses",
    ),
    ("rule_auroc_near", "AUROC of a small rule, near misses", "inactive positions are of an active one's token, or beside one"),
    ("rule_accuracy", "Balanced accuracy of a small rule", "mean of the shares told right among active and inactive positions"),
    ("intruder_words", "Intruder found by words", "least like four contexts of one band by TF-IDF; chance is 0.2"),
    ("intruder_embeddings", "Intruder found by embeddings", "least like them by the target's own token embeddings; chance is 0.2"),
    ("purity_token", "Purity of the token", "1 - H(token where active) / H(token at as many other positions)"),
    ("purity_next", "Purity of the next token", "1 - H(next token where active) / H(next token at as many others)"),
    ("purity_contexts", "Silhouette of contexts", "mean of (b - a) / max(a, b): distances a to its own, b to other contexts"),
)
_POOL = "components active at enough positions of both folds, and not at too many, by all components"
_GAIN = "minus that of a random direction that is as dense, component by component"
_BLIND = "a dictionary whose decoder is random and never trained (experiment 008): what components write does not enter"
METRICS = (
    Measured("interpretability_pool", "Share that could be drawn", "", "none", _POOL),
    *(Measured(key, title, "", "higher", formula, _BLIND) for key, title, formula in _TITLES),
    *(Measured(f"{key}_gain", f"{title}, above random directions", "", "higher", _GAIN, _BLIND) for key, title, _ in _TITLES),
)


def measure(decomposer: Decomposer, source: Source, config: ProxyConfig, progress: Progress) -> Rows:
    """Rows of every place that the method has components at."""
    need_text(source, "interpretability")
    found = harvest(decomposer, source, config)
    tools = _tools(source, config.rows, config.seed)
    whole, done = 3 * sum(len(place.components) for place in found.places), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, max(1, whole))

    about = {**columns(decomposer, Condition("clean", "clean", TRAINED)), "split": "test"}
    made: list[dict[str, Any]] = []
    for place in found.places:
        made += pool_rows(place)
        if place.components:
            shifted = place.own.shifted(np.random.default_rng(config.seed))
            own, random, chance = (score(found, activity, tools, config, tick) for activity in (place.own, place.random, shifted))
            made += rows(place, own, random, chance, BANDED, config.bands, config.bootstrap)
    return [about | row for row in made]


@lru_cache(maxsize=1)
def _tools(source: Source, rows: int, seed: int) -> Tools:
    """What all runs of a worker read contexts with, made once."""
    return Tools.of(source.target, Text.of(draw(source, "A", (), rows, 0, seed)), seed)


def _seconds(config: ProxyConfig) -> float:
    """Four passes over the text, at about 27 rows a second, and 0.05 s for each component and activity; one place."""
    return 2 + 4 * config.rows / 27 + 3 * config.components * 0.05


MEASUREMENT = Measurement(VERSION, ProxyConfig, measure, METRICS, _seconds)
