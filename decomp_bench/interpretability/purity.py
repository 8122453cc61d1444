"""How alike a component's contexts are, beside as many contexts that it was not chosen for.

All are zero for activity that has nothing to do with the text, and 1 at best.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from decomp_bench.interpretability.contexts import Embedder, cosines
from decomp_bench.interpretability.harvest import Text


def entropy(tokens: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float:
    """Entropy in nats of tokens that weigh differently."""
    _, which = np.unique(tokens, return_inverse=True)
    share = np.bincount(which, weights) / weights.sum()
    return float(-(share * np.log(np.where(share > 0, share, 1))).sum())


def tokens(text: Text, active: Int[np.ndarray, " n"], other: Int[np.ndarray, " r"], weights: Float[np.ndarray, " n"], offset: int) -> float:
    """1 - H / H', the entropies of the token `offset` after the active positions, and after as many others with the same weights.

    An entropy of few samples is too low, and that of the others is as much too low.
    """
    least = min(len(active), len(other))
    if least < 2:
        return float("nan")
    own, base = (entropy(text.around(at[:least], offset), weights[:least]) for at in (active, other))
    return 1 - own / base if base > 0 else float("nan")


def silhouette(text: Text, active: Int[np.ndarray, " n"], other: Int[np.ndarray, " r"], embedder: Embedder) -> float:
    """Mean silhouette of the active contexts: (b - a) / max(a, b) with a the mean cosine distance among them, b to the others."""
    if len(active) < 2 or not len(other):
        return float("nan")
    n = len(active)
    far = 1 - cosines(embedder(text, np.concatenate([active, other])))
    within = (far[:n, :n].sum(1) - np.diag(far)[:n]) / (n - 1)
    beyond = far[:n, n:].mean(1)
    return float(((beyond - within) / np.maximum(np.maximum(within, beyond), 1e-12)).mean())
