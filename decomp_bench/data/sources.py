"""Where a target's data comes from: its own corpus, local text, a hub data set, or a toy's distribution."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from decomp_bench.config import DataConfig, digest
from decomp_bench.data.corpus import open_corpus
from decomp_bench.data.documents import Document
from decomp_bench.data.text import SPLITS, Rows, filled, special_ids
from decomp_bench.data.tokens import rows_of_corpus
from decomp_bench.decomposer import Batch
from decomp_bench.errors import UserError
from decomp_bench.targets import NAMED, data_folder
from decomp_bench.targets.base import TargetModel
from decomp_bench.targets.toy import sparse_features

STREAM = "stream.uint16"
TOY_ROWS_A_DOCUMENT = 64
"""A toy's evaluation rows are independent; they are grouped so that intervals are computed as for documents."""
DRAWN_ROWS, DRAWN_ROWS_A_DOCUMENT = 16_384, 8
"""Token rows that a toy draws for training (an eighth for each other split), and how many of them stand for a document."""


class Source:
    """Documents of three disjoint splits as rows of tokens for one target."""

    rows_a_sequence = 1
    """Rows that make as much work as one sequence."""

    def __init__(self, target: TargetModel, config: DataConfig) -> None:
        self.target, self.config = target, config
        self.context = config.context or target.context
        self.corpus = open_corpus(config.model_copy(update={"source": _origin(target, config)}))
        target.confine(special_ids(target.tokenizer)[2] if config.packing == "confined" else None)
        self.name = self.corpus.name
        self._rows: dict[str, Rows] = {}

    @cached_property
    def hash(self) -> str:
        """Hash of the tokens of every split: results of different hashes are never compared."""
        return digest([*(self.rows(split).hash for split in SPLITS), *self._mask], 16)

    @property
    def _mask(self) -> list[str]:
        """What makes results on confined rows other than on packed ones, which are the same tokens."""
        return ["confined"] if self.config.packing == "confined" else []

    def rows(self, split: str) -> Rows:
        """Token rows of a split, tokenised once and kept in the cache folder."""
        if split == "stream" and split not in self._rows:
            self._rows[split] = self._stream()
        if split not in self._rows:
            vocabulary = _vocabulary(self.target)
            self._rows |= rows_of_corpus(self.corpus, self.target.tokenizer, self.context, self.config.packing, vocabulary)
        return filled(self._rows[split], split)

    def documents(self, split: str) -> list[Document]:
        """The split's documents: the corpus' own splits, or 85% / 5% / 10% of its text by a hash of each document."""
        return list(self.corpus.documents(split))

    def _stream(self) -> Rows:
        """The committed stream that was sampled from the target; every row is a document of its own."""
        named = NAMED.get(self.target.uri)
        file = named.path() / STREAM if named else None
        if file is None or not file.is_file():
            raise UserError(f"{self.target.uri} has no sampled stream: eval.split=test or validation; pydocs-4l has one")
        tokens = np.fromfile(file, "<u2").reshape(-1, named.context).astype(np.int32)  # type: ignore[union-attr]
        each = np.arange(len(tokens), dtype=np.int32)
        names = tuple(map(str, each))
        return Rows(tokens, np.full(len(tokens), tokens.shape[1], np.int32), each, names, names)

    def batch(self, split: str, index: np.ndarray) -> Batch:
        """Rows of a split by index, cut to the longest of them."""
        rows = self.rows(split)
        length = rows.length[index]
        tokens = rows.tokens[index][:, : int(length.max())]
        return Batch(
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(length.astype(np.int64)),
            torch.from_numpy(rows.doc[index].astype(np.int64)),
        )

    def size(self, split: str) -> int:
        """Rows in a split."""
        return len(self.rows(split).length)

    def evaluation_rows(self, split: str, tokens: int) -> int:
        """How many rows from the start of a split score this many tokens."""
        return len(self.rows(split).first(tokens).length)

    def documents_in(self, split: str, rows: int) -> int:
        """One more than the largest document index among the first rows of a split."""
        return int(self.rows(split).doc[:rows].max()) + 1

    def token_hash(self, split: str, rows: int) -> str:
        """Hash of the first rows of a split: what a result was measured on."""
        whole = self.rows(split)
        tokens = Rows(whole.tokens[:rows], whole.length[:rows], whole.doc[:rows], (), ()).hash
        return digest([tokens, *self._mask], 16) if self._mask else tokens


class ToySource(Source):
    """A toy's sparse features, drawn from the row's index alone."""

    rows_a_sequence = TOY_ROWS_A_DOCUMENT

    def __init__(self, target: TargetModel, config: DataConfig) -> None:
        _refuse_other_data(target, config)
        self.target, self.config, self.name, self.context = target, config, target.uri.split("@")[0], 1
        self._drawn: dict[str, torch.Tensor] = {}

    @property
    def hash(self) -> str:
        toy, about = self.target.toy, self.target.about
        return digest([self.name, about["features"], about["probability"], 1] if toy is None else [toy.key, 1], 16)

    def batch(self, split: str, index: np.ndarray) -> Batch:
        if split not in self._drawn:
            self._drawn[split] = torch.cat([self._block(split, block) for block in range(self.size(split) // self._together)])
        return Batch(self._drawn[split][torch.from_numpy(index)], None, torch.from_numpy((index // TOY_ROWS_A_DOCUMENT).astype(np.int64)))

    def _block(self, split: str, block: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(digest([split, block], 12), 16))
        toy, about = self.target.toy, self.target.about
        if toy is None:
            return sparse_features(TOY_ROWS_A_DOCUMENT, about["features"], about["probability"], generator)
        return toy.draw(self._together, generator)

    @property
    def _together(self) -> int:
        return TOY_ROWS_A_DOCUMENT if self.target.toy is None else self.target.toy.block

    def size(self, split: str) -> int:
        rows = 65536 if self.target.toy is None else self.target.toy.rows
        return rows if split == "train" else rows // 4

    def evaluation_rows(self, split: str, tokens: int) -> int:
        return min(self.size(split), -(-tokens // TOY_ROWS_A_DOCUMENT) * TOY_ROWS_A_DOCUMENT)

    def documents_in(self, split: str, rows: int) -> int:
        return -(-rows // TOY_ROWS_A_DOCUMENT)

    def token_hash(self, split: str, rows: int) -> str:
        return digest([self.hash, split, rows], 16)


class DrawnTokens(Source):
    """Token rows that a toy draws: whole rows, without text and without a tokenizer."""

    def __init__(self, target: TargetModel, config: DataConfig) -> None:
        _refuse_other_data(target, config)
        self.target, self.config, self.name, self.context = target, config, target.uri.split("@")[0], target.context
        self._rows: dict[str, Rows] = {}

    def documents(self, split: str) -> list[Document]:
        raise UserError(f"{self.target.uri} has no text: what needs documents takes a language model such as pydocs-4l")

    def rows(self, split: str) -> Rows:
        if split not in self._rows:
            self._rows[split] = self._draw(split)
        return self._rows[split]

    def _draw(self, split: str) -> Rows:
        if split == "stream" or self.target.toy is None:
            raise UserError(f"{self.target.uri} has no sampled stream: eval.split=test or validation; pydocs-4l has one")
        count = DRAWN_ROWS if split == "train" else DRAWN_ROWS // 8
        tokens = self.target.toy.draw(count, torch.Generator().manual_seed(int(digest(["tokens", split], 12), 16))).numpy().astype(np.int32)
        doc = np.arange(count, dtype=np.int32) // DRAWN_ROWS_A_DOCUMENT
        names = tuple(map(str, range(int(doc[-1]) + 1)))
        return Rows(tokens, np.full(count, tokens.shape[1], np.int32), doc, names, names)


def _refuse_other_data(target: TargetModel, config: DataConfig) -> None:
    if config.source is not None:
        raise UserError(f"{target.uri} has its own data: leave data.source out")


def open_source(target: TargetModel, config: DataConfig) -> Source:
    """The source for a target and a data config; raises UserError where the target has no data of its own and none is given."""
    if not target.is_lm:
        return ToySource(target, config)
    return Source(target, config) if target.toy is None else DrawnTokens(target, config)


def _origin(target: TargetModel, config: DataConfig) -> str:
    """What the config names, or else the data that the target goes with."""
    if config.source is not None:
        return config.source
    named = NAMED.get(target.uri)
    if named is None:
        raise UserError(f"{target.uri} needs data: --set data.source=FILE (text, or hf:NAME of the hub), or data.source=pydocs")
    return "pydocs" if named.data is None else str(data_folder() / named.data)


def _vocabulary(target: TargetModel) -> int:
    """Tokens that the model has embeddings for."""
    embeddings = getattr(target.module, "get_input_embeddings", lambda: None)()
    return len(target.tokenizer) if embeddings is None else int(embeddings.weight.shape[0])
