"""Which component stands for a concept: the one whose activity tells it best, by AUROC on texts that are used for nothing else.

Every method goes through the same search over all its sites. A component of signed strength is read both as its value and as the size of
its value, since the sign of a rank-one component is a matter of gauge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from decomp_bench.auroc import auroc
from decomp_bench.concepts.sample import Sample
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Batch, Decomposer, Site
from decomp_bench.intervene import Components
from decomp_bench.replacement import clean_codes, clean_points

HELD_BYTES = 2_000_000_000
"""Codes that are held at once; where more are needed, sites take turns and the texts are read again."""


@dataclass(frozen=True)
class Found:
    """A component, how well it tells a concept, and the direction in which its value moves where the concept holds."""

    site: str
    component: int
    auroc: float
    sign: float
    density: float
    """Share of the positions where it is active."""


@dataclass(frozen=True)
class SiteScores:
    """Of every component [n] of a site, for every concept [c]."""

    auroc: Float[Tensor, "n c"]
    sign: Float[Tensor, "n c"]
    density: Float[Tensor, " n"]


Scores = dict[str, SiteScores]


def batches(decomposer: Decomposer, sample: Sample, size: int = 16) -> Iterator[tuple[slice, Batch]]:
    """A sample's rows with the clean activations that a decomposition needs."""
    points = clean_points(decomposer)
    for start in range(0, len(sample.index), size):
        rows = slice(start, min(start + size, len(sample.index)))
        yield rows, with_clean(sample.source, sample.source.batch(sample.split, sample.index[rows]), points)


@torch.no_grad()
def scores(decomposer: Decomposer, sample: Sample, size: int = 16) -> Scores:
    """Scores of every component on a sample: concepts of spans are told at each token, topics by the mean over a row's tokens."""
    a_site = [4 * site.n * int((sample.length - 1).sum()) for site in decomposer.sites]
    found: Scores = {}
    waiting = list(decomposer.sites)
    while waiting:
        taken = [waiting.pop(0)]
        while waiting and sum(a_site[decomposer.sites.index(s)] for s in (*taken, waiting[0])) <= HELD_BYTES:
            taken.append(waiting.pop(0))
        found |= _scores_of(decomposer, sample, taken, size)
    return found


def _scores_of(decomposer: Decomposer, sample: Sample, sites: Sequence[Site], size: int) -> Scores:
    values: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    means: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    labels = []
    for rows, batch in batches(decomposer, sample, size):
        kept = positions(batch, True)[:, 1:].cpu()
        labels.append(sample.tokens[rows][:, : kept.shape[1]][kept])
        codes = clean_codes(decomposer, batch)
        for site in sites:
            value = codes[site.name].value.float().cpu()
            values[site.name].append(value[kept])
            share = (kept / kept.sum(1, keepdim=True))[..., None]
            means[site.name].append(torch.stack([(value * share).sum(1), (value.abs() * share).sum(1)]))
    at_tokens = torch.cat(labels)
    made = {}
    for site in sites:
        by_token = torch.cat(values.pop(site.name))
        by_row = torch.cat(means.pop(site.name), 1)
        made[site.name] = _site_scores(by_token, by_row, at_tokens, sample)
    return made


def _site_scores(by_token: Tensor, by_row: Tensor, labels: Tensor, sample: Sample) -> SiteScores:
    whole = torch.tensor([concept.of_documents for concept in sample.concepts], dtype=torch.bool)
    n, c = by_token.shape[1], len(sample.concepts)
    best, sign = torch.full((n, c), torch.nan, dtype=torch.float64), torch.ones(n, c)
    signed = bool((by_token < 0).any())
    for chosen, value, size, held in ((~whole, by_token, by_token.abs(), labels), (whole, by_row[0], by_row[1], sample.topic)):
        if chosen.any():
            held = held[:, chosen]
            direct = auroc(value, held)
            if signed:
                direct = torch.maximum(torch.maximum(direct, 1 - direct), auroc(size, held))
            best[:, chosen] = direct
            sign[:, chosen] = _directions(value, held) if signed else 1.0
    return SiteScores(best, sign, (by_token != 0).float().mean(0))


def _directions(value: Float[Tensor, "rows n"], labels: Tensor) -> Float[Tensor, "n c"]:
    """The sign of the mean value where a concept holds minus the mean where it does not."""
    weight = labels.float()
    inside = value.T @ (weight / weight.sum(0).clamp_min(1))
    outside = value.T @ ((1 - weight) / (1 - weight).sum(0).clamp_min(1))
    return torch.where(inside >= outside, 1.0, -1.0)


def best(found: Scores, concept: int, k: int = 1, sites: Sequence[str] | None = None) -> list[Found]:
    """The k components of highest AUROC over all sites (or those named), best first; fewer where AUROC is undefined."""
    ranked: list[Found] = []
    for name, score in found.items():
        if sites is None or name in sites:
            value = score.auroc[:, concept].nan_to_num(-1)
            top = value.topk(min(k, len(value)))
            ranked += [_found(name, score, int(i), concept) for i, v in zip(top.indices, top.values, strict=True) if v >= 0]
    return sorted(ranked, key=lambda one: -one.auroc)[:k]


def _found(site: str, score: SiteScores, component: int, concept: int) -> Found:
    value, sign = float(score.auroc[component, concept]), float(score.sign[component, concept])
    return Found(site, component, value, sign, float(score.density[component]))


def controls(found: Scores, chosen: Sequence[Found], concept: int, generator: np.random.Generator, among: int = 10) -> list[Found]:
    """For each chosen component a random one of its site, drawn among those of nearest density; none is chosen itself or drawn twice."""
    taken = {(one.site, one.component) for one in chosen}
    drawn = []
    for one in chosen:
        score = found[one.site]
        near = (score.density - one.density).abs().argsort(stable=True).tolist()
        free = [i for i in near if (one.site, i) not in taken][:among]
        if free:
            component = int(generator.choice(free))
            taken.add((one.site, component))
            drawn.append(_found(one.site, score, component, concept))
    return drawn


def components(chosen: Sequence[Found]) -> Components:
    """Chosen components as an intervention takes them, pushed in the direction of the concept."""
    made: dict[str, dict[int, float]] = {}
    for one in chosen:
        made.setdefault(one.site, {})[one.component] = one.sign
    return made
