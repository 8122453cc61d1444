"""What a target loses on a topic and elsewhere when components are zeroed: losses by document, selectivity, and loss at equal damage.

Components are selected on fold A; fold C scores. A topic is on in its documents; a concept of spans is on where the token to be predicted
belongs to one. Padding is never scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from decomp_bench.bootstrap import resampled
from decomp_bench.concepts.sample import Sample
from decomp_bench.config import Config
from decomp_bench.decomposer import Decomposer
from decomp_bench.intervene import Components, Intervention, intervened
from decomp_bench.metrics.observe import Scored, log_probabilities
from decomp_bench.selection import batches


class AblationConfig(Config):
    """Which concepts are ablated, with how many components, and on what it is measured."""

    concepts: tuple[str, ...] = ()
    """Names of concepts; none: all topics of the data set, or all its concepts where its documents have no labels."""
    counts: tuple[PositiveInt, ...] = (1, 2, 5, 10, 20, 50)
    """Numbers of ablated components."""
    control_counts: tuple[PositiveInt, ...] = (1, 5, 20, 50, 100, 200)
    """Numbers of ablated random components: more, since it takes more of them to do the same damage."""
    damages: tuple[PositiveFloat, ...] = (0.001, 0.003, 0.01, 0.03)
    """Losses |dCE| on other text, in nats a token, at which methods are compared."""
    general: PositiveInt = 96
    positive: PositiveInt = 16
    """Random rows of fold A, and rows more of each topic."""
    off_rows: PositiveInt = 48
    on_rows: PositiveInt = 16
    """Random rows of fold C, and rows more of each topic."""
    controls: PositiveInt = 5
    """Draws of random components, or directions, whose mean is the control."""
    bootstrap: PositiveInt = 1000
    seed: int = 0


@dataclass(frozen=True)
class Losses:
    """Of each document [D]: its number, scored tokens on and off the concept [2, D], and for each ablation the rise of the summed
    cross-entropy there [ablations, 2, D]."""

    document: np.ndarray
    tokens: np.ndarray
    rise: np.ndarray


@torch.no_grad()
def losses(decomposer: Decomposer, held_out: Sample, c: int, ablated: Sequence[Components]) -> Losses:
    """What each ablation costs each document of a sample, on and off its concept `c`. The reconstruction error is kept."""
    document, place = np.unique(held_out.documents, return_inverse=True)
    tokens = torch.zeros(2, len(document), dtype=torch.float64)
    rise = torch.zeros(len(ablated), 2, len(document), dtype=torch.float64)
    for rows, batch in batches(decomposer, held_out):
        scored, doc = Scored.of(batch, True), torch.from_numpy(place[rows])
        assert scored.next_kept is not None
        assert scored.clean_logp is not None
        kept = scored.next_kept
        on = held_out.tokens[rows, 1 : 1 + kept.shape[1], c].to(kept.device)
        sides = torch.stack([kept & on, kept & ~on]).double()
        tokens.index_add_(1, doc, sides.sum(-1).cpu())
        clean = _chosen(scored.clean_logp, batch.x)
        for i, chosen in enumerate(ablated):
            out = intervened(decomposer, batch, Intervention("zero", chosen)).logits
            lost = (clean - _chosen(log_probabilities(out), batch.x)).double()
            rise[i].index_add_(1, doc, (sides * lost).sum(-1).cpu())
    return Losses(document, tokens.numpy(), rise.numpy())


def _chosen(logp: Float[Tensor, "B T2 vocab"], x: Tensor | None) -> Float[Tensor, "B T2"]:
    """Log-probability of the token that follows each scored position."""
    assert x is not None
    return logp.gather(-1, x[:, 2:, None])[..., 0]


@dataclass(frozen=True)
class Resamples:
    """Documents and how often each is drawn: first as they are, then in resamples, each within documents of the same topics."""

    document: np.ndarray
    weight: np.ndarray

    @staticmethod
    def of(document: np.ndarray, topics: np.ndarray, replicates: int) -> Resamples:
        """From the numbers of documents [D] and the topics of each [D, topics]."""
        weight = np.ones((1 + replicates, len(document)))
        for pattern in np.unique(topics, axis=0):
            own = (topics == pattern).all(1)
            weight[:, own] = resampled(int(own.sum()), replicates)
        return Resamples(document, weight)

    def rises(self, lost: Losses) -> np.ndarray:
        """dCE in nats a token of every ablation, on and off the concept [ablations, 2, replicates]; NaN where a resample has no token."""
        weight = self.weight[:, np.searchsorted(self.document, lost.document)]
        tokens = weight @ lost.tokens.T
        summed = np.einsum("rd,asd->asr", weight, lost.rise)
        return np.divide(summed, tokens.T, out=np.full_like(summed, np.nan), where=tokens.T > 0)


def selectivity(on: np.ndarray, off: np.ndarray) -> np.ndarray:
    """dCE_on / (dCE_on + |dCE_off|) in [0, 1], a negative dCE_on counted as 0; NaN where neither text loses anything."""
    lost = np.maximum(on, 0)
    total = lost + np.abs(off)
    return np.divide(lost, total, out=np.full_like(total, np.nan), where=total > 0)


def at_damage(on: np.ndarray, off: np.ndarray, damage: float) -> np.ndarray:
    """dCE_on [replicates] at the first place of a curve where |dCE_off| reaches a damage, by linear interpolation from no ablation on.

    Curves are values [ablations, replicates]; NaN where a curve does not reach the damage, for nothing is extrapolated.
    """
    start = np.zeros((1, on.shape[1]))
    x, y = np.abs(np.concatenate([start, off])), np.concatenate([start, on])
    reached = x >= damage
    place = np.maximum(reached.argmax(0), 1)
    each = np.arange(x.shape[1])
    after_x, after_y, before_x, before_y = x[place, each], y[place, each], x[place - 1, each], y[place - 1, each]
    share = np.divide(damage - before_x, after_x - before_x, out=np.zeros_like(after_x), where=after_x > before_x)
    return np.where(reached.any(0), before_y + share * (after_y - before_y), np.nan)
