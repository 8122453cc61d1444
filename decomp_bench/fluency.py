"""Is a generated text still text? Likelihood under the clean model, in both directions, and repetition. Imports no torch.

Fluency F = exp(-max(0, NLL - NLL of the unsteered text of the same prompt) / s) R, where s is the standard deviation of NLL over natural
texts of the same length and R compares distinct bigrams and repeated 4-grams with natural text's. A text more likely than all but the
likeliest hundredth of natural texts is degenerate unless the unsteered text was as likely: F is 0. The clean model judges its own text,
which favours methods that stay near it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Natural:
    """Natural texts of the length of the generated ones: spread and lowest hundredth of NLL, mean distinct-2 and 4-gram repetition."""

    spread: float
    lowest: float
    distinct: float
    repetition: float

    @staticmethod
    def of(nll: np.ndarray, texts: np.ndarray) -> Natural:
        """From the NLL [n] and the tokens [n, length] of natural texts."""
        distinct = float(np.mean([distinct_share(row, 2) for row in texts]))
        repetition = float(np.mean([1 - distinct_share(row, 4) for row in texts]))
        return Natural(float(np.std(nll)), float(np.quantile(nll, 0.01)), distinct, repetition)


def distinct_share(tokens: np.ndarray, n: int) -> float:
    """Distinct n-grams of a text over all its n-grams; 1 for a text that is shorter."""
    grams = [tuple(tokens[i : i + n].tolist()) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def variety(tokens: np.ndarray, natural: Natural) -> float:
    """R in [0, 1]: distinct bigrams and unrepeated 4-grams, each relative to natural text's and at most 1, multiplied."""
    distinct = min(1.0, distinct_share(tokens, 2) / max(natural.distinct, 1e-9))
    return distinct * min(1.0, distinct_share(tokens, 4) / max(1 - natural.repetition, 1e-9))


def fluency(nll: np.ndarray, unsteered: np.ndarray, texts: np.ndarray, natural: Natural) -> np.ndarray:
    """F of each text [n] from its NLL, the NLL of the unsteered text of its prompt, and its tokens [n, length]."""
    likelihood = np.exp(-np.maximum(0, nll - unsteered) / max(natural.spread, 1e-9))
    degenerate = nll < np.minimum(natural.lowest, unsteered)
    return np.where(degenerate, 0.0, likelihood) * np.array([variety(row, natural) for row in texts])


def harmonic(*scores: np.ndarray) -> np.ndarray:
    """Harmonic mean of scores in [0, 1], element by element; 0 where any of them is 0."""
    stacked = np.stack(scores)
    with np.errstate(divide="ignore"):
        return np.where((stacked > 0).all(0), len(scores) / (1 / np.maximum(stacked, 1e-300)).sum(0), 0.0)
