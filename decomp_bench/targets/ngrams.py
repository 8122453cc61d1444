"""Cross-entropies of counting models: what a language model must beat before its components are worth explaining."""

from __future__ import annotations

import torch
from torch import Tensor

from decomp_bench.targets.rows import Rows

ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0, 200.0, 300.0, 500.0, 1000.0)


def _pairs(rows: Rows) -> tuple[Tensor, Tensor]:
    """(previous, next) token of every scored position, [n] each."""
    scored = rows.predicted()
    return rows.tokens[:, :-1][scored], rows.tokens[:, 1:][scored]


class NGrams:
    """Unigram and bigram counts of some rows.

    The unigram is add-one smoothed; the bigram backs off to it: p(b|a) = (n(a,b) + alpha p(b)) / (n(a) + alpha).
    """

    def __init__(self, rows: Rows, vocab: int) -> None:
        before, after = _pairs(rows)
        self.pairs = torch.bincount(before * vocab + after, minlength=vocab * vocab).reshape(vocab, vocab)
        counts = self.pairs.sum(0).double() + 1
        self.p = counts / counts.sum()
        self.context = self.pairs.sum(1)

    def unigram(self, rows: Rows) -> float:
        """Cross-entropy of the unigram in nats per token."""
        return float(-self.p.log()[_pairs(rows)[1]].mean())

    def bigram(self, rows: Rows, alpha: float) -> float:
        """Cross-entropy of the bigram in nats per token, with `alpha` pseudo-counts of the unigram."""
        before, after = _pairs(rows)
        mass = (self.pairs[before, after] + alpha * self.p[after]) / (self.context[before] + alpha)
        return float(-mass.log().mean())

    def best_alpha(self, rows: Rows) -> float:
        """The alpha with the lowest bigram cross-entropy on some rows (the validation split)."""
        return min(ALPHAS, key=lambda alpha: self.bigram(rows, alpha))
