"""Splits, and documents as rows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from decomp_bench.data.documents import Document
from decomp_bench.errors import UserError

SPLITS = ("train", "validation", "test")
SHORTEST_ROW = 16
"""Rows of fewer tokens are left out of training and evaluation alike."""


def split_of(name: str, validation: float = 0.05, test: float = 0.10) -> str:
    """The split that a name falls into by its hash alone, the same on every machine."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
    return "test" if place < test else "validation" if place < test + validation else "train"


@dataclass(frozen=True)
class Rows:
    """Token rows: ids [N, context] padded on the right, real positions of each row [N], index of each row's document [N].

    `documents` and `labels` are the documents' names and labels. Packed rows have a document of their own each, for statistics, and in
    `origin` [N, context] the index of the text that each position is from.
    """

    tokens: np.ndarray
    length: np.ndarray
    doc: np.ndarray
    documents: tuple[str, ...]
    labels: tuple[str, ...]
    origin: np.ndarray | None = None

    @property
    def hash(self) -> str:
        """Hash of the tokens and of where rows and documents begin."""
        state = hashlib.sha256()
        for part in (self.tokens, self.length, self.doc):
            state.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        return state.hexdigest()[:16]

    def first(self, scored: int) -> Rows:
        """Whole rows from the start until this many positions are scored (all but the first of each row)."""
        upto = int(np.searchsorted(np.cumsum(self.length - 1), scored, side="left")) + 1
        origin = None if self.origin is None else self.origin[:upto]
        return Rows(self.tokens[:upto], self.length[:upto], self.doc[:upto], self.documents, self.labels, origin)


class Tokens:
    """Token ids of one split's documents, gathered batch by batch as arrays, so that no text is kept."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.labels: list[str] = []
        self.sizes: list[int] = []
        self._parts: list[np.ndarray] = []

    def add(self, name: str, label: str, ids: Sequence[int]) -> None:
        """Add a document."""
        self.names.append(name)
        self.labels.append(label)
        self.sizes.append(len(ids))
        self._parts.append(np.asarray(ids, np.int32))

    def in_order(self) -> tuple[list[np.ndarray], tuple[str, ...], tuple[str, ...]]:
        """Ids, names and labels of the documents in the order of the hashes of their names, the same for any order of reading."""
        order = sorted(range(len(self.names)), key=lambda i: hashlib.sha256(self.names[i].encode()).hexdigest())
        return [self._parts[i] for i in order], tuple(self.names[i] for i in order), tuple(self.labels[i] for i in order)


def to_rows(documents: list[Document], tokenizer: Any, context: int, split: str) -> Rows:
    """Rows of documents that are at hand, unpacked; raises UserError where nothing is left."""
    tokens = Tokens()
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"] if documents else []
    for document, ids in zip(documents, encoded, strict=True):
        tokens.add(document.name, document.label, ids)
    return filled(separate_rows(tokens, context, *special_ids(tokenizer)[:2]), split)


def special_ids(tokenizer: Any) -> tuple[int, int, int]:
    """The ids that begin a row, pad it, and stand between packed documents; raises UserError where a tokenizer has none."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    first = bos if bos is not None else eos
    if first is None:
        raise UserError("the tokenizer has neither a beginning-of-text nor an end-of-text token: rows need one of them")
    return first, pad if pad is not None else first, eos if eos is not None else first


def filled(rows: Rows, split: str) -> Rows:
    """The rows, where there are any; raises UserError where there are none."""
    if not len(rows.length):
        raise UserError(f"the {split} split has no row of at least {SHORTEST_ROW} tokens: give more or longer documents in data.source")
    return rows


def separate_rows(tokens: Tokens, context: int, first: int, pad: int) -> Rows:
    """Cut each document into rows: the token `first`, then up to context - 1 tokens, padded. A row never mixes documents.

    Rows come in a fixed random order, so that any prefix is a fair sample of all documents. Rows below SHORTEST_ROW tokens are left out.
    """
    pieces, names, labels = tokens.in_order()
    cuts = [(doc, start) for doc, ids in enumerate(pieces) for start in range(0, len(ids), context - 1)]
    cuts = [(doc, start) for doc, start in cuts if min(context, len(pieces[doc]) - start + 1) >= SHORTEST_ROW]
    ids, length = np.full((len(cuts), context), pad, np.int32), np.empty(len(cuts), np.int32)
    ids[:, 0] = first
    for row, (doc, start) in enumerate(cuts):
        piece = pieces[doc][start : start + context - 1]
        ids[row, 1 : len(piece) + 1], length[row] = piece, len(piece) + 1
    return _shuffled(Rows(ids, length, np.array([doc for doc, _ in cuts], np.int32), names, labels))


def given_rows(tokens: Tokens, context: int, pad: int) -> Rows:
    """Rows of a data set that is tokenised already: the first `context` ids of each document as they are, padded."""
    pieces, names, labels = tokens.in_order()
    kept = [doc for doc, ids in enumerate(pieces) if min(context, len(ids)) >= SHORTEST_ROW]
    ids, length = np.full((len(kept), context), pad, np.int32), np.empty(len(kept), np.int32)
    for row, doc in enumerate(kept):
        piece = pieces[doc][:context]
        ids[row, : len(piece)], length[row] = piece, len(piece)
    return _shuffled(Rows(ids, length, np.array(kept, np.int32), names, labels))


def packed_rows(tokens: Tokens, context: int, separator: int) -> Rows:
    """Documents in a row, each followed by the separator, cut every `context` tokens; the rest that fills no row is left out.

    `origin` says for each position which document it is from (a separator belongs to the document that it ends). The statistics take a
    row for their unit, since a row has several documents: each row is a document of its own in `doc`, and bootstrap intervals resample
    rows. A document that goes over a row's end is in two of these blocks; where documents are not much shorter than rows, intervals
    are therefore a little too narrow.
    """
    pieces, _, _ = tokens.in_order()
    sizes = np.array([len(ids) + 1 for ids in pieces], np.int64)
    ends, count = np.cumsum(sizes), int(sizes.sum()) // context
    flat = np.full(int(sizes.sum()), separator, np.int32)
    for ids, end in zip(pieces, ends, strict=True):
        flat[end - 1 - len(ids) : end - 1] = ids
    origin = np.repeat(np.arange(len(pieces), dtype=np.int32), sizes)[: count * context].reshape(count, context)
    each, rows = np.arange(count, dtype=np.int32), flat[: count * context].reshape(count, context)
    shuffled = _shuffled(Rows(rows, np.full(count, context, np.int32), each, (), (), origin))
    names = tuple(map(str, each))
    return replace(shuffled, doc=each, documents=names, labels=names)


def _shuffled(rows: Rows) -> Rows:
    order = np.random.default_rng(0).permutation(len(rows.length))
    origin = None if rows.origin is None else rows.origin[order]
    return replace(rows, tokens=rows.tokens[order], length=rows.length[order], doc=rows.doc[order], origin=origin)
