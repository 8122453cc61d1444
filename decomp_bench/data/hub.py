"""Data sets of the Hugging Face hub, and local folders in their formats, as one stream of texts or of token ids."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

from decomp_bench.config import DataConfig
from decomp_bench.data.local import AT_ONCE, fingerprint, missing_column, place
from decomp_bench.errors import UserError
from decomp_bench.remote import hub_reachable

SCHEME = "hf:"
HUB_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
STREAMED = 100_000
"""Documents of a stream where no number is asked for."""
BUFFER = 10_000
"""Documents among which a stream is shuffled."""


@dataclass(frozen=True)
class Known:
    """How a published data set is read where the config does not say."""

    column: str = "text"
    lower: bool = False
    tokenised: bool = False
    streaming: bool = True
    tokenizer: str | None = None
    """The tokenizer that an already tokenised data set was made with."""


_PILE_TOKENS = Known("input_ids", tokenised=True, tokenizer="EleutherAI/gpt-neox-20b")
KNOWN = {
    "SimpleStories/SimpleStories": Known("story", lower=True),
    "roneneldan/TinyStories": Known(),
    "monology/pile-uncopyrighted": Known(),
    "Skylion007/openwebtext": Known(),
    "danbraunai/pile-uncopyrighted-tok": _PILE_TOKENS,
    "danbraunai/pile-uncopyrighted-tok-shuffled": _PILE_TOKENS,
}


class HubData:
    """The data set that `hf:NAME` (or `hf:NAME@REVISION`, or `hf:FOLDER`) and the other keys of a data config describe.

    Nothing is opened before `contents` is asked for. With `streaming` nothing is downloaded whole, and the documents come in an order
    shuffled by a buffer with the data seed; otherwise they come in the data set's own order.
    """

    def __init__(self, config: DataConfig) -> None:
        assert config.source is not None
        self.config, rest = config, config.source.removeprefix(SCHEME)
        folder = place(rest)
        self.folder = folder if rest and folder.is_dir() else None
        self.repository, _, revision = ("", "", "") if self.folder else rest.partition("@")
        if self.folder is None and not HUB_NAME.fullmatch(self.repository):
            help_ = "data.source=hf:NAME takes a local data set folder or a hub name such as hf:roneneldan/TinyStories"
            raise UserError(f"no folder {folder}: {help_}" if rest else help_)
        self.revision = revision or None
        self.name = self.folder.resolve().name if self.folder else rest
        known = KNOWN.get(self.repository, Known(streaming=False))
        self.tokenised = known.tokenised if config.tokenised is None else config.tokenised
        self.column = config.column if config.column != "text" else known.column
        if self.tokenised and self.column == "text":
            self.column = "input_ids"
        self.lower = not self.tokenised and (known.lower if config.lower is None else config.lower)
        self.streaming = known.streaming if config.streaming is None else config.streaming
        self.limit = config.documents or (STREAMED if self.streaming else None)
        self._tokenizer = known.tokenizer

    @cached_property
    def key(self) -> list[Any]:
        """What decides the documents, known without opening them: rows made once are kept until `decomp-bench cache evict`."""
        where = fingerprint(sorted(f for f in self.folder.rglob("*") if f.is_file())) if self.folder else [self.repository, self.revision]
        splits = [self.config.split, self.config.validation_split, self.config.test_split]
        order = self.config.seed if self.streaming else None
        return [where, self.config.subset, splits, self.column, self.lower, self.tokenised, self.limit, order]

    def contents(self, split: str) -> Iterator[str | list[int] | None]:
        """Texts, or token ids of a tokenised data set, of one of the data set's own splits: the first `documents` of them.

        Raises UserError for a data set, split or column that is not there, without network, and for a column of another kind.
        """
        try:
            dataset = self._opened(split)
            if dataset.column_names is not None and self.column not in dataset.column_names:
                raise missing_column(f"the data set '{self.name}'", self.column, list(dataset.column_names))
            if self.streaming:
                dataset = dataset.shuffle(seed=self.config.seed, buffer_size=BUFFER)
            yield from islice(self._values(dataset), self.limit)
        except UserError:
            raise
        except Exception as error:
            raise self._unread(split, (str(error).strip().splitlines() or [type(error).__name__])[0]) from None

    def _values(self, dataset: Any) -> Iterator[str | list[int] | None]:
        for batch in dataset.iter(batch_size=AT_ONCE):
            if self.column not in batch:
                raise missing_column(f"the data set '{self.name}'", self.column, list(batch))
            for value in batch[self.column]:
                if value is not None and isinstance(value, str) == self.tokenised:
                    kind = "text: leave data.tokenised out" if self.tokenised else "no text: for token ids set data.tokenised=true"
                    raise UserError(f"column '{self.column}' of the data set '{self.name}' holds {kind}, or set data.column")
                yield value.lower() if self.lower and value is not None else value

    def _opened(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of is raised as well, and said in one line
        saved = self.folder and any((self.folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
        if self.folder is None:
            return self._of_hub(split)
        if not saved:  # streamed from its files: the library would copy them otherwise
            return datasets.load_dataset(str(self.folder), self.config.subset, split=split, streaming=True)
        found: Any = datasets.load_from_disk(str(self.folder))
        splits = found if isinstance(found, dict) else {self.config.split: found}
        if split not in splits:
            raise UserError(f"the data set in {self.folder} has no split '{split}'; it has {', '.join(splits)}")
        return splits[split].to_iterable_dataset() if self.streaming else splits[split]

    def _of_hub(self, split: str) -> Any:
        """A data set of the Hub, or where the Hub does not answer the library's own copy; the library would try for half a minute."""
        import datasets
        from huggingface_hub import constants

        reachable = hub_reachable()
        if not reachable and self.streaming:
            raise self._unread(split, "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer")
        with (
            mock.patch("datasets.config.HF_HUB_OFFLINE", not reachable),
            mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", not reachable),
        ):
            return datasets.load_dataset(self.repository, self.config.subset, split=split, revision=self.revision, streaming=self.streaming)

    def _unread(self, split: str, reason: str) -> UserError:
        subset = f", subset '{self.config.subset}'" if self.config.subset else ""
        if self.folder is not None:
            return UserError(f"cannot read {self.folder} as a data set (split '{split}'{subset}): {reason}")
        local = "without network give a local copy: data.source=FILE, or data.source=hf:FOLDER"
        return UserError(f"cannot read the data set '{self.name}' (split '{split}'{subset}) from the hub: {reason}; {local}")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise UserError where token ids were made with another vocabulary; passes where the tokenizer is not known or cannot be had."""
        from transformers import AutoTokenizer

        made_with = self._tokenizer or self._declared_tokenizer()
        if made_with is None or made_with == getattr(tokenizer, "name_or_path", None):
            return
        try:
            other: Any = AutoTokenizer.from_pretrained(made_with)
        except Exception:  # the ids are still checked against the vocabulary's size
            return
        if other.get_vocab() != tokenizer.get_vocab():
            made = f"the data set '{self.name}' was tokenised with '{made_with}'"
            raise UserError(f"{made}, whose vocabulary is not the target's; give its text")

    def _declared_tokenizer(self) -> str | None:
        """`tokenizer_name` of the record that sae-lens leaves beside the token ids, sae_lens.json."""
        try:
            if self.folder is not None:
                file = self.folder / "sae_lens.json"
            else:
                from huggingface_hub import hf_hub_download

                file = Path(hf_hub_download(self.repository, "sae_lens.json", repo_type="dataset", revision=self.revision))
            return json.loads(file.read_text()).get("tokenizer_name")
        except Exception:  # most data sets have none
            return None
