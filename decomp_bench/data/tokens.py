"""From a corpus to the token rows of its three splits: tokenised in batches, checked, and kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from decomp_bench.config import digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.corpus import Corpus, Record, content_name, verify_disjoint
from decomp_bench.data.text import SPLITS, Rows, Tokens, given_rows, packed_rows, separate_rows, special_ids
from decomp_bench.errors import UserError
from decomp_bench.files import atomically

FORMAT = 3  # raise when the rows of a corpus change
BATCH = 1000
"""Documents tokenised together."""
Packing = Literal["none", "packed", "confined"]


def rows_of_corpus(
    corpus: Corpus, tokenizer: Any, context: int, packing: Packing = "none", vocabulary: int | None = None
) -> dict[str, Rows]:
    """Split -> rows, from the cache where they are; a split may come out without rows.

    Packed and confined rows are the same: a document mask is the target's affair (`TargetModel.confine`). Raises UserError for token ids
    from `vocabulary` (the model's number of embeddings) on, for a text in two splits, and for a data set that was tokenised by another
    tokenizer.
    """
    if corpus.tokenised and packing != "none":
        raise UserError(f"'{corpus.name}' is tokenised, and its rows are taken as they are: leave data.packing out")
    packing = "none" if packing == "none" else "packed"  # confined ones are the same rows
    words = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    key = [corpus.key, words, special_ids(tokenizer), context, packing, FORMAT]
    files = {split: cache_dir() / "rows" / f"{digest([key, split], 20)}.npz" for split in SPLITS}
    kept = {split: _kept(file) for split, file in files.items()}
    made = {split: rows for split, rows in kept.items() if rows is not None}
    if len(made) < len(SPLITS):
        made = _made(corpus, tokenizer, context, packing, vocabulary)
        for split, rows in made.items():
            _keep(rows, files[split])
    for rows in made.values():
        _check_ids(corpus, rows.tokens, vocabulary)
    return made


def _made(corpus: Corpus, tokenizer: Any, context: int, packing: Packing, vocabulary: int | None) -> dict[str, Rows]:
    first, pad, separator = special_ids(tokenizer)
    found = {split: Tokens() for split in SPLITS}
    hashes: dict[str, set[str]] = {split: set() for split in SPLITS}
    if corpus.tokenised:
        corpus.check_tokenizer(tokenizer)
    for record, ids in _encoded(corpus, tokenizer):
        _check_ids(corpus, np.asarray(ids, np.int64), vocabulary)
        found[record.split].add(record.name, record.label, ids)
        hashes[record.split].add(content_name(record.content))
    verify_disjoint(hashes)
    if corpus.tokenised:
        return {split: given_rows(tokens, context, pad) for split, tokens in found.items()}
    if packing == "packed":
        return {split: packed_rows(tokens, context, separator) for split, tokens in found.items()}
    return {split: separate_rows(tokens, context, first, pad) for split, tokens in found.items()}


def _encoded(corpus: Corpus, tokenizer: Any) -> Iterator[tuple[Record, list[int]]]:
    records = corpus.read()
    while batch := list(islice(records, BATCH)):
        texts: Any = [record.content for record in batch]
        yield from zip(batch, texts if corpus.tokenised else tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)


def _check_ids(corpus: Corpus, ids: np.ndarray, vocabulary: int | None) -> None:
    if vocabulary is None or not ids.size:
        return
    wrong = int(ids.max()) if ids.max() >= vocabulary else int(ids.min())
    if not 0 <= wrong < vocabulary:
        cause = "the data set was tokenised for another model: give its text" if corpus.tokenised else "give the model its own tokenizer"
        raise UserError(f"'{corpus.name}' has token id {wrong}, but the model's vocabulary is 0 to {vocabulary - 1}: {cause}")


def _kept(file: Path) -> Rows | None:
    try:
        kept = np.load(file, allow_pickle=False)
        names, labels = (tuple(str(v) for v in kept[key]) for key in ("documents", "labels"))
        origin = kept.get("origin")
        return Rows(kept["tokens"], kept["length"], kept["doc"], names, labels, origin)
    except (OSError, ValueError, KeyError):  # absent, or broken by hand: made again
        return None


def _keep(rows: Rows, file: Path) -> None:
    columns: dict[str, Any] = {"tokens": rows.tokens, "length": rows.length, "doc": rows.doc}
    columns |= {"documents": np.array(rows.documents, str), "labels": np.array(rows.labels, str)}
    columns |= {} if rows.origin is None else {"origin": rows.origin}

    def save(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, **columns)

    atomically(file, save)
