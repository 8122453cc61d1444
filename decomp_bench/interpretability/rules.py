"""A small rule about tokens in the place of an explanation: made on one fold, and scored on another as a detector of activity.

A rule is a weighted vote of a few literals: a token at one of the last four places, the last two tokens, a class of spelling at one of the
last two places, how far into the row. Literals are chosen one by one as boosting does (Schapire and Singer 1999, voters that abstain
where they do not hold). How well it tells active from inactive positions of other documents is how far such rules describe the
component; it says nothing of descriptions of another kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix

from decomp_bench.auroc import auroc
from decomp_bench.interpretability.harvest import Text

PLACES = (0, -1, -2, -3)
CLASS_PLACES = (0, -1)
CLASSES = (
    r"[ ▁]\w",  # begins a word
    r"\w",  # goes on with one
    r"[ ▁]?[A-Z]",
    r"[ ▁]?[A-Z_]{2,}$",
    r"[ ▁]?\d+$",
    r"[ ▁]?[^\w\s]+$",  # punctuation
    r"\s*\n",
    r"\s+$",
    r".*[_.]\w",  # parts of names in code
)
WIDTH = 1 << 44
"""Codes of one kind of literal lie in a range of this width."""


class Literals:
    """What rules are made of, for one tokenizer's pieces of text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.classes = np.array([[bool(re.match(pattern, piece)) for pattern in CLASSES] for piece in pieces], bool)

    def of(self, text: Text, at: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n kinds"]:
        """The code of the literal of each kind that holds at each position, -1 where none does."""
        tokens = {place: text.around(at, place) for place in PLACES}
        found = list(tokens.values())
        found.append(np.where(tokens[-1] >= 0, tokens[0] * (1 << 22) + tokens[-1], -1))
        for place in CLASS_PLACES:
            known = (tokens[place] >= 0) & (tokens[place] < len(self.classes))
            holds = self.classes[np.where(known, tokens[place], 0)] & known[:, None]
            found += [np.where(column, 0, -1) for column in holds.T]
        found.append(np.log2(text.place[at] + 1).astype(np.int64))
        return np.stack([np.where(codes >= 0, codes + kind * WIDTH, -1) for kind, codes in enumerate(found)], 1)


@dataclass(frozen=True)
class Rule:
    """Literals by their codes, and the weight of each one's vote."""

    literals: tuple[int, ...]
    weights: tuple[float, ...]

    def score(self, codes: Int[np.ndarray, "n kinds"]) -> Float[np.ndarray, " n"]:
        """The sum of the votes; above zero: active."""
        score = np.zeros(len(codes))
        for literal, weight in zip(self.literals, self.weights, strict=True):
            score += weight * (codes == literal).any(1)
        return score


def fit(codes: Int[np.ndarray, "n kinds"], active: Bool[np.ndarray, " n"], most: int) -> Rule:
    """A rule of at most this many literals; both classes weigh the same. No literal where one class is empty."""
    if active.all() or not active.any():
        return Rule((), ())
    literals, column = np.unique(codes, return_inverse=True)
    holds = csr_matrix((np.ones(codes.size), column.ravel(), np.arange(0, codes.size + 1, codes.shape[1])), (len(codes), len(literals)))
    holds = holds[:, literals >= 0].T.tocsr()  # every row of codes has each literal at most once, since kinds do not share codes
    literals = literals[literals >= 0]
    weight = np.where(active, 0.5 / active.sum(), 0.5 / (~active).sum())
    smooth = 1 / len(active)
    chosen, votes = [], []
    for _ in range(min(most, len(literals))):
        on, off = holds @ (weight * active), holds @ (weight * ~active)
        z = weight.sum() - on - off + 2 * np.sqrt((on + smooth) * (off + smooth))
        best = int(z.argmin())
        if z[best] >= weight.sum() * (1 - 1e-3) and chosen:
            break
        vote = 0.5 * float(np.log((on[best] + smooth) / (off[best] + smooth)))
        here = holds[best].toarray()[0] > 0
        weight = weight * np.exp(np.where(here, np.where(active, -vote, vote), 0.0))
        chosen.append(int(literals[best]))
        votes.append(vote)
    return Rule(tuple(chosen), tuple(votes))


def separation(score: Float[np.ndarray, " n"], active: Bool[np.ndarray, " n"]) -> float:
    """AUROC with ties counted half; NaN where a class is empty."""
    return float(auroc(torch.from_numpy(score)[:, None], torch.from_numpy(active)[:, None]))


def balanced_accuracy(said: Bool[np.ndarray, " n"], active: Bool[np.ndarray, " n"]) -> float:
    """The mean of the shares that are right among active and among inactive positions; NaN where a class is empty."""
    if active.all() or not active.any():
        return float("nan")
    return float((said[active].mean() + (~said[~active]).mean()) / 2)
