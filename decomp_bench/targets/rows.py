"""Rows of tokens as tensors, for training and scoring targets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from decomp_bench.data.documents import Document
from decomp_bench.data.text import SHORTEST_ROW
from decomp_bench.targets.base import places_in_documents

CONTEXT = 256  # tokens in a row, the leading BOS among them


@dataclass(frozen=True)
class Rows:
    """Rows of tokens: BOS, then a piece of one document, then padding.

    tokens: [rows, context] integers (int64 in rows that were taken); lengths: [rows] tokens of each row without padding (BOS counts);
    document: [rows] the index of the document that a row was cut from. A row never mixes documents. The padding is BOS too: use `lengths`.
    """

    tokens: Tensor
    lengths: Tensor
    document: Tensor
    separator: int | None = None
    """In packed rows whose documents do not see each other, the token that ends one."""

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Tensor) -> Rows:
        """Some of the rows, cut to the longest among them."""
        lengths = self.lengths[index]
        longest = int(lengths.max()) if len(index) else 0
        return replace(self, tokens=self.tokens[index, :longest].long(), lengths=lengths, document=self.document[index])

    def to(self, device: torch.device) -> Rows:
        """The rows on another device."""
        return replace(self, tokens=self.tokens.to(device), lengths=self.lengths.to(device), document=self.document.to(device))

    def head(self, n: int) -> Rows:
        """The first rows."""
        return self.take(torch.arange(min(n, len(self))))

    def inputs(self) -> dict[str, Any]:
        """What a model of transformers is called with to predict the tokens after the first."""
        given: dict[str, Any] = {"input_ids": self.tokens[:, :-1], "use_cache": False}
        return given if self.separator is None else {**given, "position_ids": places_in_documents(given["input_ids"], self.separator)}

    def predicted(self) -> Tensor:
        """[rows, width - 1] bool: which tokens after the BOS are real, hence predicted and scored."""
        return torch.arange(1, self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def n_predicted(self) -> int:
        """The number of tokens that are scored: all real ones but the BOS."""
        return int((self.lengths - 1).sum())


def rows_of(documents: list[Document], tokenizer: Any, context: int) -> Rows:
    """The same rows that evaluation cuts (`data.text.to_rows`), in an order of their own that decides the trained weights.

    Documents come in the order of the hashes of their names, and the rows of a document in the order of its text.
    """
    ordered = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())
    pieces: list[list[int]] = []
    origin: list[int] = []
    for index, ids in enumerate(tokenizer([d.text for d in ordered], add_special_tokens=False)["input_ids"]):
        found = [ids[start : start + context - 1] for start in range(0, len(ids), context - 1)]
        found = [piece for piece in found if len(piece) + 1 >= SHORTEST_ROW]
        pieces += found
        origin += [index] * len(found)
    tokens = torch.full((len(pieces), context), tokenizer.bos_token_id, dtype=torch.int64)
    for row, piece in zip(tokens, pieces, strict=True):
        row[1 : len(piece) + 1] = torch.tensor(piece)
    return Rows(tokens, torch.tensor([len(piece) + 1 for piece in pieces]), torch.tensor(origin))


def batches(rows: Rows, size: int) -> Iterable[Rows]:
    """All rows in groups of similar length, so that little padding is computed; the order is the same every time."""
    order = torch.argsort(rows.lengths, stable=True)
    for start in range(0, len(rows), size):
        yield rows.take(order[start : start + size])
