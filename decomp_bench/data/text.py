"""Documents from local text, and documents as rows of tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decomp_bench.data.documents import Document
from decomp_bench.errors import UserError

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".parquet")
SHORTEST_ROW = 16
"""Rows of fewer tokens are left out of training and evaluation alike."""


def split_of(name: str, validation: float = 0.05, test: float = 0.10) -> str:
    """The split that a name falls into by its hash alone, the same on every machine."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
    return "test" if place < test else "validation" if place < test + validation else "train"


def read_documents(source: str, column: str) -> list[Document]:
    """Documents of a .txt (blank-line paragraphs gathered to about 2,000 characters), .jsonl or .parquet file, or a folder of them.

    A document's name is the hash of its text, so that duplicates fall into one split. Raises UserError for a missing, broken or
    empty source and for a missing column.
    """
    path = Path(os.path.expandvars(source)).expanduser()
    if not path.exists():
        raise UserError(f"no data at {path}: data.source takes a {', '.join(SUFFIXES)} file or a folder of them")
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path]
    texts = [(file.stem, text) for file in files for text in _texts(file, column) if text.strip()]
    if not texts:
        raise UserError(f"no text in {path}: it needs {', '.join(SUFFIXES)} files with some text")
    return [Document(hashlib.sha256(text.encode()).hexdigest()[:16], label, text) for label, text in texts]


def _texts(file: Path, column: str) -> Iterator[str]:
    try:
        if file.suffix == ".txt":
            yield from _paragraphs(file.read_text(encoding="utf-8"))
        elif file.suffix == ".jsonl":
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                yield _column(json.loads(line), column, f"{file} line {number}")
        elif file.suffix == ".parquet":
            import pandas as pd

            table = pd.read_parquet(file)
            if column not in table:
                raise UserError(f"{file} has no column '{column}'; it has {', '.join(map(str, table.columns))}: set data.column")
            yield from table[column].astype(str)
        else:
            raise UserError(f"{file}: data.source takes {', '.join(SUFFIXES)} files")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {file} as {file.suffix[1:]}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def _column(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict) or column not in record:
        raise UserError(f"{where} has no key '{column}': set data.column")
    return str(record[column])


def _paragraphs(text: str, size: int = 2000) -> Iterator[str]:
    gathered = ""
    for paragraph in text.split("\n\n"):
        gathered += ("\n\n" if gathered else "") + paragraph
        if len(gathered) >= size:
            yield gathered
            gathered = ""
    if gathered:
        yield gathered


@dataclass(frozen=True)
class Rows:
    """Token rows: ids [N, context] padded on the right, real positions of each row [N], index of each row's document [N]."""

    tokens: np.ndarray
    length: np.ndarray
    doc: np.ndarray
    documents: tuple[str, ...]
    labels: tuple[str, ...]

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
        return Rows(self.tokens[:upto], self.length[:upto], self.doc[:upto], self.documents, self.labels)


def to_rows(documents: list[Document], tokenizer: Any, context: int, split: str) -> Rows:
    """Cut each document into rows: the beginning-of-text token, then up to context - 1 tokens. A row never mixes documents.

    Rows come in a fixed random order, so that any prefix is a fair sample of all documents. Raises UserError where nothing is left.
    """
    ordered = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first
    if first is None:
        raise UserError("the tokenizer has neither a beginning-of-text nor an end-of-text token: rows need one of them")
    ids, length, doc = [], [], []
    encoded = tokenizer([d.text for d in ordered], add_special_tokens=False)["input_ids"] if ordered else []
    for index, tokens in enumerate(encoded):
        for start in range(0, len(tokens), context - 1):
            row = [first, *tokens[start : start + context - 1]]
            if len(row) >= SHORTEST_ROW:
                ids.append(row + [pad] * (context - len(row)))
                length.append(len(row))
                doc.append(index)
    if not ids:
        raise UserError(f"the {split} split has no row of at least {SHORTEST_ROW} tokens: give more or longer documents in data.source")
    shuffled = np.random.default_rng(0).permutation(len(ids))
    return Rows(
        np.array(ids, np.int32)[shuffled],
        np.array(length, np.int32)[shuffled],
        np.array(doc, np.int32)[shuffled],
        tuple(d.name for d in ordered),
        tuple(d.label for d in ordered),
    )
