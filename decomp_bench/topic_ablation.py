"""Topic ablation: zero the components that tell a topic, and measure what the target loses on texts of the topic and on others.

Components are selected on fold A; fold C scores. Selectivity is dCE_on / (dCE_on + |dCE_off|) with a gain on the topic counted as no
loss: it lies in [0, 1]. Since few strong components and many weak ones damage other text differently, methods are also compared at
equal damage there, by interpolation along the number of ablated components and never beyond what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt

from decomp_bench import directions
from decomp_bench.bootstrap import resampled
from decomp_bench.concepts import Concept, concepts_of
from decomp_bench.concepts.sample import Sample, draw
from decomp_bench.config import Config
from decomp_bench.contenders import Contender, spread, tidy
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.errors import UserError
from decomp_bench.intervene import Components, Intervention, intervened, one
from decomp_bench.metrics.observe import Scored, base_sums, behaviour_sums
from decomp_bench.selection import Scores, batches, best, components, controls, scores

if TYPE_CHECKING:
    import pandas as pd

FEWEST_DOCUMENTS = 2


class AblationConfig(Config):
    """Which topics are ablated, with how many components, and on what it is measured."""

    concepts: tuple[str, ...] = ()
    """Names of topics; none: all that the data set has."""
    counts: tuple[PositiveInt, ...] = (1, 2, 5, 10, 20, 50)
    """Numbers of ablated components."""
    damages: tuple[PositiveFloat, ...] = (0.001, 0.003, 0.01, 0.03)
    """Losses |dCE| on other texts, in nats a token, at which methods are compared."""
    general: PositiveInt = 96
    positive: PositiveInt = 16
    """Random rows of fold A, and rows more of each topic."""
    off_rows: PositiveInt = 48
    on_rows: PositiveInt = 16
    """Random rows of fold C, and rows more of each topic."""
    bootstrap: PositiveInt = 1000
    seed: int = 0


@dataclass(frozen=True)
class Loss:
    """Of each document: its number, the sum of the rise of the cross-entropy, and the scored tokens."""

    document: np.ndarray
    rise: np.ndarray
    tokens: np.ndarray

    def of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums and counts of some documents."""
        chosen = np.isin(self.document, documents)
        return self.rise[chosen], self.tokens[chosen]


def ablate(
    contenders: Sequence[Contender],
    source: Source,
    config: AblationConfig,
    concepts: Sequence[Concept] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Tidy rows (see `contenders.COLUMNS`) of every topic and method: losses by number of components, and at equal damage."""
    if not contenders:
        raise UserError("ablation needs at least one run: name trained runs")
    topics = [c for c in (concepts_of(source.name, config.concepts) if concepts is None else concepts) if c.of_documents]
    if not topics:
        raise UserError(f"{source.name} has no topics: ablation needs documents with labels, such as pydocs")
    select = draw(source, "A", topics, config.general, config.positive, config.seed)
    held_out = draw(source, "C", topics, config.off_rows, config.on_rows, config.seed)
    found = [scores(contender.decomposer, select) for contender in contenders]
    layers = sorted({layer for contender in contenders for layer in contender.decomposer.layers})
    fitted = directions.outputs(select, layers)
    rows: list[dict[str, Any]] = []
    for c, topic in enumerate(topics):
        about = {"concept": topic.name, "kind": topic.kind, "split": "C"}
        inside = np.unique(held_out.documents[held_out.topic[:, c].numpy()])
        if len(inside) < FEWEST_DOCUMENTS or not select.topic[:, c].any():
            rows.append(about | {"metric": "selectivity", "value": math.nan, "n": len(inside), "reason": "too few documents of the topic"})
            continue
        for contender, score in zip(contenders, found, strict=True):
            for form, counted in _component_ablations(score, c, config):
                own = {"method": contender.name, "run": contender.run, "form": form}
                rows += [about | own | row for row in _curve(contender.decomposer, counted, held_out, inside, config)]
        for form, bank, counted in _direction_ablations(contenders[0].decomposer, fitted, c, config):
            rows += [about | {"method": form, "form": "projection"} | row for row in _curve(bank, counted, held_out, inside, config)]
        if progress:
            progress({"concept": topic.name, "done": c + 1, "concepts": len(topics)})
    return tidy(rows)


Counted = dict[int, Components]


def _component_ablations(score: Scores, c: int, config: AblationConfig) -> Iterator[tuple[str, Counted]]:
    """The components that tell a topic best, and random ones of their sites that are as often active."""
    most = best(score, c, max(config.counts))
    random = controls(score, most, c, np.random.default_rng([config.seed, c]))
    for form, picked in (("components", most), ("random components", random)):
        yield form, {count: components(picked[:count]) for count in config.counts if count <= len(picked)}


def _direction_ablations(judge: Decomposer, fitted: tuple, c: int, config: AblationConfig) -> Iterator[tuple[str, Decomposer, Counted]]:
    """A direction projected out of the MLP outputs of the first, first two, ... layers: difference in means, and a random one."""
    outputs, _, held = fitted
    generator = torch.Generator().manual_seed(config.seed + c)
    means = {layer: y.mean(0) for layer, y in outputs.items()}
    told = {layer: directions.mean_difference(y, held[:, c]) for layer, y in outputs.items()}
    random = {layer: torch.randn(len(mean), generator=generator) for layer, mean in means.items()}
    for form, vectors in (("difference in means", told), ("random direction", random)):
        bank = directions.Directions.of(judge.target, {layer: vector[None] for layer, vector in vectors.items()}, means)
        names = [site.name for site in bank.sites]
        yield form, bank, {n: {name: one(name, 0)[name] for name in names[:n]} for n in range(1, len(names) + 1)}


@torch.no_grad()
def losses(decomposer: Decomposer, held_out: Sample, ablated: Sequence[Components]) -> list[Loss]:
    """What each ablation costs each document. Padding and a row's first prediction do not count; the error is kept."""
    sums = [torch.zeros(int(held_out.documents.max()) + 1, dtype=torch.float64) for _ in range(len(ablated) + 1)]
    for rows, batch in batches(decomposer, held_out):
        document = torch.from_numpy(held_out.documents[rows].astype(np.int64))
        scored = Scored.of(batch, True)
        clean = base_sums(scored)
        sums[-1].index_add_(0, document, clean["targets", "all"].cpu())
        for total, chosen in zip(sums, ablated, strict=False):
            out = intervened(decomposer, batch, Intervention("zero", chosen))
            rise = behaviour_sums(scored, out.logits, "all")["ce", "all"] - clean["ce_clean", "all"]
            total.index_add_(0, document, rise.double().cpu())
    seen = np.flatnonzero(sums[-1].numpy() > 0)
    return [Loss(seen, total.numpy()[seen], sums[-1].numpy()[seen]) for total in sums[:-1]]


def selectivity(on: np.ndarray, off: np.ndarray) -> np.ndarray:
    """dCE_on / (dCE_on + |dCE_off|) in [0, 1], a negative dCE_on counted as 0; NaN where neither text loses anything."""
    lost = np.maximum(on, 0)
    total = lost + np.abs(off)
    return np.divide(lost, total, out=np.full_like(total, np.nan), where=total > 0)


def _curve(
    decomposer: Decomposer, counted: Counted, held_out: Sample, inside: np.ndarray, config: AblationConfig
) -> Iterator[dict[str, Any]]:
    """Rows of one method's ablations of one topic, by count, then at equal damage to other texts."""
    measured = losses(decomposer, held_out, list(counted.values()))
    curve = []
    for (count, chosen), loss in zip(counted.items(), measured, strict=True):
        outside = np.setdiff1d(loss.document, inside)
        (on, on_tokens), (off, off_tokens) = loss.of(inside), loss.of(outside)
        if not len(on) or not len(off):
            yield {"factor": count, "metric": "selectivity", "value": math.nan, "reason": "too few documents on or off the topic"}
            return
        weight_on, weight_off = resampled(len(on), config.bootstrap), resampled(len(off), config.bootstrap)
        d_on, d_off = (weight_on @ on) / (weight_on @ on_tokens), (weight_off @ off) / (weight_off @ off_tokens)
        curve.append((d_on, d_off))
        site = next(iter(chosen))
        about = {"factor": count, "site": site, "component": next(iter(chosen[site]))}
        for metric, value in (("ce_on", d_on), ("ce_off", d_off), ("selectivity", selectivity(d_on, d_off))):
            yield about | {"metric": metric, **spread(value, len(on) if metric != "ce_off" else len(off))}
    n = len(np.intersect1d(measured[0].document, inside)) if measured else 0
    for damage in config.damages if curve else ():
        on = at_damage([d for d, _ in curve], [d for _, d in curve], damage)
        reason = "" if math.isfinite(on[0]) else "this much damage was not reached"
        yield {"factor": damage, "metric": "ce_on_at_damage", "reason": reason, **spread(on, n)}
        yield {
            "factor": damage,
            "metric": "selectivity_at_damage",
            "reason": reason,
            **spread(selectivity(on, np.full_like(on, damage)), n),
        }


def at_damage(on: Sequence[np.ndarray], off: Sequence[np.ndarray], damage: float) -> np.ndarray:
    """dCE_on at the first place of a curve where |dCE_off| reaches a damage, by linear interpolation; the curve starts at no ablation.

    Curves are given as values [replicates] at each count; NaN where a curve does not reach the damage.
    """
    x = np.abs(np.stack([np.zeros_like(off[0]), *off]))
    y = np.stack([np.zeros_like(on[0]), *on])
    reached = x >= damage
    place = reached.argmax(0)
    each = np.arange(x.shape[1])
    after_x, after_y, before_x, before_y = x[place, each], y[place, each], x[place - 1, each], y[place - 1, each]
    share = np.divide(damage - before_x, after_x - before_x, out=np.zeros_like(after_x), where=after_x > before_x)
    return np.where(reached.any(0), before_y + share * (after_y - before_y), np.nan)
