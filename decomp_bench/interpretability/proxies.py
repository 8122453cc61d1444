"""Scores of how far contexts say when components are active, without a judge: proxies of interpretability, and no more than that.

Every activity is put through the same: that of the drawn components, of random directions that are as dense, and of components whose
activity was shifted along the text, which shows what chance comes to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from pydantic import PositiveInt

from decomp_bench.concepts.pieces import Pieces
from decomp_bench.interpretability import contexts, intruder, purity, rules
from decomp_bench.interpretability.examples import draw, some
from decomp_bench.interpretability.harvest import Activity, Harvest, HarvestConfig, Text
from decomp_bench.targets.base import TargetModel

BANDED = ("rule_auroc", "intruder_words", "intruder_embeddings")
"""Scores that are also given by band of size."""
WHOLE = ("rule_auroc_near", "rule_accuracy", "purity_token", "purity_next", "purity_contexts")


class ProxyConfig(HarvestConfig):
    """How components are scored."""

    bands: PositiveInt = 4
    """Bands of equally many active positions, by size, that examples are spread over."""
    examples: PositiveInt = 160
    """Active positions that a rule is made from, and as many that it is scored on; as many inactive ones each time."""
    literals: PositiveInt = 5
    """Literals of a rule at most."""
    tasks: PositiveInt = 6
    """Intruder tasks of each component and band."""
    similar: PositiveInt = 40
    """Contexts whose likeness is measured."""


@dataclass(frozen=True)
class Tools:
    """What contexts are read with, made once for a target and its text."""

    literals: rules.Literals
    embedders: dict[str, contexts.Embedder]

    @staticmethod
    def of(target: TargetModel, fit: Text, seed: int) -> Tools:
        """Document frequencies and the mean embedding are those of fold A."""
        pieces = Pieces(target.tokenizer).of
        found = {
            "words": contexts.words(fit, max(len(pieces), int(fit.tokens.max()) + 1), seed),
            "embeddings": contexts.embeddings(target, fit, seed),
        }
        return Tools(rules.Literals(pieces), {name: one for name, one in found.items() if one is not None})


Scores = dict[str, Float[np.ndarray, "m bands"]]
"""Metric -> of each component its score over all, then by band from the smallest sizes; NaN where there is none."""


def score(harvest: Harvest, activity: Activity, tools: Tools, config: ProxyConfig, tick: Callable[[], None]) -> Scores:
    """Scores of every component of an activity; `tick` is called once for each."""
    m = activity.fit.shape[1]
    found = {name: np.full((m, 1 + config.bands), np.nan) for name in (*BANDED, *WHOLE)}
    for c in range(m):
        _ruled(found, c, harvest, activity, tools, config)
        _alike(found, c, harvest.held, activity.held[:, c], tools, config)
        tick()
    given = intruder.tasks(harvest.held, activity.held, config.bands, config.tasks, config.seed)
    for name, embedder in tools.embedders.items():
        right = intruder.found_out(given, harvest.held, embedder) if len(given.at) else np.empty(0)
        for c in range(m):
            by_band = [right[(given.component == c) & (given.band == band)] for band in range(config.bands)]
            means = [one.mean() if len(one) else np.nan for one in by_band]
            found[f"intruder_{name}"][c] = [np.nanmean(means) if np.isfinite(means).any() else np.nan, *means]
    return found


def _ruled(found: Scores, c: int, harvest: Harvest, activity: Activity, tools: Tools, config: ProxyConfig) -> None:
    """A rule from fold A, scored on fold C: against all inactive positions, against near misses alone, and for each band."""
    generator = np.random.default_rng([config.seed, 1, c])
    made = draw(harvest.fit, activity.fit[:, c], config.examples, config.bands, generator)
    rule = rules.fit(tools.literals.of(harvest.fit, made.at), made.labels, config.literals)
    held = draw(harvest.held, activity.held[:, c], config.examples, config.bands, generator)
    said = rule.score(tools.literals.of(harvest.held, held.at))
    active, inactive = said[: len(held.active)], said[len(held.active) :]

    def against(own: np.ndarray, others: np.ndarray) -> float:
        return rules.separation(np.concatenate([own, others]), np.arange(len(own) + len(others)) < len(own))

    found["rule_auroc"][c, 0] = against(active, inactive)
    found["rule_auroc_near"][c, 0] = against(active, inactive[len(held.random) :])
    found["rule_accuracy"][c, 0] = rules.balanced_accuracy(said > 0, held.labels)
    for band in range(config.bands):
        found["rule_auroc"][c, 1 + band] = against(active[held.band == band], inactive)


def _alike(found: Scores, c: int, text: Text, size: Float[np.ndarray, " P"], tools: Tools, config: ProxyConfig) -> None:
    generator = np.random.default_rng([config.seed, 2, c])
    active = some(np.flatnonzero(size > 0), config.examples, generator)
    other = some(np.flatnonzero(size == 0), config.examples, generator)
    found["purity_token"][c, 0] = purity.tokens(text, active, other, size[active], 0)
    found["purity_next"][c, 0] = purity.tokens(text, active, other, size[active], 1)
    few = config.similar
    found["purity_contexts"][c, 0] = purity.silhouette(text, active[:few], other[:few], tools.embedders["words"])
