"""Rows of text with the concepts that hold in them, by fold: what selects components never chooses a factor, scores or trains a detector.

Folds are made of whole documents. A selects and D trains detectors: halves of the training split by a hash of the name. B chooses and C
scores: the validation and the test split, which neither the target nor any decomposition has seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from decomp_bench.concepts.base import Concept
from decomp_bench.concepts.pieces import Pieces
from decomp_bench.data.sources import Source

Fold = Literal["A", "B", "C", "D"]
SPLIT = {"A": "train", "B": "validation", "C": "test", "D": "train"}


def half_of(name: str) -> Fold:
    """The fold of a training document: a hash of its name."""
    return "A" if hashlib.sha256(f"fold {name}".encode()).digest()[0] % 2 == 0 else "D"


def fold_rows(source: Source, fold: Fold) -> np.ndarray:
    """Indices of a fold's rows in its split."""
    rows = source.rows(SPLIT[fold])
    if SPLIT[fold] != "train":
        return np.arange(len(rows.length))
    inside = np.array([half_of(name) == fold for name in rows.documents])
    return np.flatnonzero(inside[rows.doc])


@dataclass(frozen=True)
class Sample:
    """Some rows of one fold and the concepts that are looked for in them."""

    source: Source
    fold: Fold
    index: np.ndarray
    concepts: tuple[Concept, ...]

    @property
    def split(self) -> str:
        return SPLIT[self.fold]

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.source.target.tokenizer)

    @cached_property
    def length(self) -> np.ndarray:
        """Real positions of each row, the first included."""
        return self.source.rows(self.split).length[self.index]

    @cached_property
    def documents(self) -> np.ndarray:
        """The document of each row."""
        return self.source.rows(self.split).doc[self.index]

    def text(self, row: int, start: int = 1, end: int | None = None) -> str:
        """Text of a row's real tokens from one position to another."""
        tokens = self.source.rows(self.split).tokens[self.index[row]][: self.length[row]]
        return self.pieces.text(tokens[start:end])

    @cached_property
    def topic(self) -> Bool[Tensor, "rows c"]:
        """Where the topics hold; False for concepts of spans."""
        labels = self.source.rows(self.split).labels
        return torch.tensor([[c.in_label(labels[doc]) for c in self.concepts] for doc in self.documents]).reshape(-1, len(self.concepts))

    @cached_property
    def tokens(self) -> Bool[Tensor, "rows positions c"]:
        """Where concepts hold at positions 1 and later of each row; a topic holds everywhere in its documents, nothing in padding."""
        whole = self.source.rows(self.split)
        width = int(self.length.max()) - 1
        found = np.zeros((len(self.index), width, len(self.concepts)), bool)
        for i, (row, length) in enumerate(zip(self.index, self.length, strict=True)):
            ids = whole.tokens[row][1:length]
            for c, concept in enumerate(self.concepts):
                found[i, : length - 1, c] = bool(self.topic[i, c]) if concept.of_documents else self.pieces.holds(concept, ids)
        return torch.from_numpy(found)


def draw(source: Source, fold: Fold, concepts: Sequence[Concept], general: int, positive: int, seed: int = 0) -> Sample:
    """Random rows of a fold, and `positive` more of each topic's, spread over as many documents as there are."""
    rows, pool = source.rows(SPLIT[fold]), fold_rows(source, fold)
    pool = np.random.default_rng(seed).permutation(pool)
    chosen = set(pool[:general].tolist())
    for concept in concepts:
        if concept.of_documents:
            of_label = {label: concept.in_label(label) for label in set(rows.labels)}
            own = [int(i) for i in pool if of_label[rows.labels[rows.doc[i]]]]
            chosen |= set(_spread(own, rows.doc)[:positive])
    return Sample(source, fold, np.array(sorted(chosen), np.int64), tuple(concepts))


def _spread(rows: list[int], doc: np.ndarray) -> list[int]:
    """One row of each document, then a second of each, and so on."""
    seen: dict[int, int] = {}
    order = []
    for place, row in enumerate(rows):
        turn = seen[int(doc[row])] = seen.get(int(doc[row]), -1) + 1
        order.append((turn, place, row))
    return [row for _, _, row in sorted(order)]
