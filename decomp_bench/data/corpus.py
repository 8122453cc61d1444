"""The documents behind a data config, in three splits that share none, read one after another."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from decomp_bench.config import DataConfig
from decomp_bench.data.documents import Document
from decomp_bench.data.hub import SCHEME, HubData
from decomp_bench.data.local import files_of, fingerprint, label_of, place, stem, text_name, texts
from decomp_bench.data.text import SPLITS, split_of
from decomp_bench.errors import UserError

HELD_OUT_FIRST = ("test", "validation", "train")
HUB_KEYS = ("subset", "split", "validation_split", "test_split", "streaming", "tokenised")


@dataclass(frozen=True)
class Record:
    """One document of a split: its text, or its token ids where the data set is tokenised already."""

    split: str
    name: str
    label: str
    content: str | list[int]


@dataclass(frozen=True)
class Corpus:
    """A named text: `key` changes when its documents do (known without reading them), `read` goes through its records once."""

    name: str
    key: Any
    read: Callable[[], Iterator[Record]]
    tokenised: bool = False
    check_tokenizer: Callable[[Any], None] = lambda _tokenizer: None

    def documents(self, split: str) -> Iterator[Document]:
        """The texts of a split; raises UserError for a corpus of token ids."""
        if self.tokenised:
            raise UserError(f"'{self.name}' holds token ids, not text; give its text in data.source")
        for record in self.read():
            if record.split == split:
                yield Document(record.name, record.label, str(record.content))


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `data.source` names; raises UserError where it is not there. Nothing is read yet."""
    source = config.source or "pydocs"
    if source == "pydocs":
        return _pydocs(config)
    if source.startswith(SCHEME):
        hub = HubData(config)
        return Corpus(hub.name, ["hub", hub.key], lambda: _hub_records(hub), hub.tokenised, hub.check_tokenizer)
    _refuse(config, HUB_KEYS, f"for hub data sets only (data.source=hf:NAME or hf:FOLDER); {source} is local text")
    files, lower = files_of(source), bool(config.lower)

    def read() -> Iterator[Record]:
        pairs = ((label_of(file), text) for file in files for text in texts(file, config.column))
        lowered = ((label, text.lower() if lower and text else text) for label, text in islice(pairs, config.documents))
        return _nonempty(str(place(source)), (_by_hash(label, text) for label, text in lowered))

    return Corpus(stem(source), ["local", fingerprint(files), config.column, lower, config.documents], read)


def _pydocs(config: DataConfig) -> Corpus:
    from decomp_bench.data import pydocs

    _refuse(config, (*HUB_KEYS, "documents", "lower"), "the embedded corpus is taken as it is")

    def read() -> Iterator[Record]:
        return (Record(split, d.name, d.label, d.text) for split in SPLITS for d in pydocs.documents(split))

    return Corpus("pydocs", ["pydocs", pydocs.corpus_hash()], read)


def _refuse(config: DataConfig, keys: tuple[str, ...], why: str) -> None:
    """Raise UserError where one of these keys is set."""
    if unused := [f"data.{key}" for key in keys if getattr(config, key) != DataConfig.model_fields[key].default]:
        raise UserError(f"{', '.join(unused)}: {why}")


def _by_hash(label: str, content: str | list[int] | None, held_out: tuple[str, ...] = ("validation", "test")) -> Record | None:
    """A record in the split that its hash gives, train where that split comes from elsewhere; None for an empty one."""
    if content is None or not (content.strip() if isinstance(content, str) else len(content)):
        return None
    name = content_name(content)
    split = split_of(name)
    return Record(split if split in held_out else "train", name, label, content)


def content_name(content: str | list[int]) -> str:
    """16 hex digits of the hash of a text or of token ids."""
    if isinstance(content, str):
        return text_name(content)
    return hashlib.sha256(np.asarray(content, np.int64).tobytes()).hexdigest()[:16]


def _nonempty(name: str, records: Iterator[Record | None]) -> Iterator[Record]:
    """The records that have content; one warning says how many had none. Raises UserError where all are empty."""
    empty = full = 0
    for record in records:
        if record is None:
            empty += 1
            continue
        full += 1
        yield record
    if not full:
        raise UserError(f"no text in {name}: it has no document that is not empty")
    if empty:
        warnings.warn(f"{name}: {empty:,} of {empty + full:,} documents are empty and are left out", stacklevel=2)


def _hub_records(hub: HubData) -> Iterator[Record]:
    """Given splits as they are, the others by hash from `data.split`; a text that a held-out split has is dropped from later ones."""
    given = {"test": hub.config.test_split, "validation": hub.config.validation_split, "train": hub.config.split}
    cut = tuple(split for split in ("validation", "test") if given[split] is None)
    held_out: set[str] = set()
    dropped = dict.fromkeys(HELD_OUT_FIRST, 0)
    for split in HELD_OUT_FIRST:
        if given[split] is None:
            continue
        pieces = (_by_hash(hub.name, content, cut if split == "train" else ()) for content in hub.contents(str(given[split])))
        mine: set[str] = set()
        for record in _nonempty(f"{hub.name}, split {given[split]}", pieces):
            if record.name in held_out:
                dropped[split] += 1
                continue
            if split != "train":
                mine.add(record.name)
            yield record if split == "train" else Record(split, record.name, record.label, record.content)
        held_out |= mine
    if any(dropped.values()):
        counts = " and ".join(f"{number:,} from {split}" for split, number in dropped.items() if number)
        warnings.warn(f"{hub.name}: documents that a held-out split has too are dropped: {counts}", stacklevel=2)


def verify_disjoint(hashes: Mapping[str, set[str]]) -> None:
    """Raise UserError where the documents of two splits, as hashes of their contents, overlap."""
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if both := hashes.get(one, set()) & hashes.get(other, set()):
            raise UserError(f"{len(both):,} documents of the {one} split are in the {other} split too; drop them from data.source")
