"""Contexts as vectors, the same for every method: by their words alone (TF-IDF), or by the target's own frozen token embeddings.

A context is the tokens around a position. Each weighs by its distance, so that what a component was active at counts most, as for a reader
who sees it marked. The target's embeddings are part of the model that is being explained; words are not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, issparse
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize

from decomp_bench.interpretability.examples import some
from decomp_bench.interpretability.harvest import Text
from decomp_bench.targets.base import TargetModel

BEFORE, AFTER = 10, 5
"""Tokens of a context before and after its position."""
WEIGHTS = np.exp(-np.abs(np.arange(-BEFORE, AFTER + 1)) / 2.0)
"""Weight of each token of a context: 1 at the position, 1 / e two tokens from it."""
FITTED_ON = 4096
"""Random contexts that document frequencies and the mean embedding are taken from."""

Vectors = np.ndarray | csr_matrix
Embedder = Callable[[Text, np.ndarray], Vectors]
"""Unit vectors [n, d] of the contexts of positions [n]; a context without any known token is zero."""


def windows(text: Text, at: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n w"]:
    """Tokens around each position, -1 beyond its row."""
    return np.stack([text.around(at, step) for step in range(-BEFORE, AFTER + 1)], 1)


def words(text: Text, vocabulary: int, seed: int) -> Embedder:
    """TF-IDF of tokens; frequencies are those of random contexts of this text."""
    idf = TfidfTransformer().fit(_counted(text, _random(text, seed), vocabulary, np.ones_like(WEIGHTS))).idf_
    return lambda other, at: _scaled(_counted(other, at, vocabulary, WEIGHTS).multiply(idf[None]).tocsr())


def embeddings(target: TargetModel, text: Text, seed: int) -> Embedder | None:
    """Means of the target's input embeddings less that of random contexts of this text; None where the target's module names none."""
    layer = getattr(target.module, "get_input_embeddings", lambda: None)()
    if layer is None or not isinstance(getattr(layer, "weight", None), torch.Tensor):
        return None
    table = layer.weight.detach().float().cpu().numpy()

    def mean(other: Text, at: np.ndarray) -> np.ndarray:
        return np.asarray(_scaled(_counted(other, at, len(table), WEIGHTS), "l1") @ table)

    centre = mean(text, _random(text, seed)).mean(0)
    return lambda other, at: _scaled(mean(other, at) - centre)


def _scaled(vectors: Vectors, norm: str = "l2") -> Vectors:
    """Rows of length one; a row of zeros stays so."""
    return normalize(vectors, norm)  # type: ignore[return-value]


def _random(text: Text, seed: int) -> Int[np.ndarray, " n"]:
    return some(np.arange(len(text.row)), FITTED_ON, np.random.default_rng(seed))


def _counted(text: Text, at: np.ndarray, vocabulary: int, weights: Float[np.ndarray, " w"]) -> csr_matrix:
    """The weight of every token in each context [n, vocabulary]."""
    tokens = windows(text, at)
    row, step = np.nonzero((tokens >= 0) & (tokens < vocabulary))
    return csr_matrix((weights[step], (row, tokens[row, step])), (len(tokens), vocabulary))


def cosines(vectors: Vectors) -> Float[np.ndarray, "n n"]:
    """Of all pairs of unit vectors."""
    found = vectors @ vectors.T
    return np.asarray(found.todense() if issparse(found) else found, np.float64)  # type: ignore[union-attr]


def cosines_in_groups(vectors: Vectors, size: int) -> Float[np.ndarray, "groups size size"]:
    """Of all pairs within groups of `size` consecutive vectors."""
    found = np.ones((vectors.shape[0] // size, size, size))  # type: ignore[index]
    for i in range(size):
        for j in range(i):
            pair = vectors[i::size], vectors[j::size]
            both = pair[0].multiply(pair[1]) if issparse(pair[0]) else pair[0] * pair[1]  # type: ignore[union-attr]
            found[:, i, j] = found[:, j, i] = np.asarray(both.sum(1)).ravel()
    return found
