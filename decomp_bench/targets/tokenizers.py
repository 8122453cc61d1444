"""The tokenizer of a checkpoint that comes without one of its own, or with tokenizer.json alone: local files first, then the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from decomp_bench.config import read_yaml
from decomp_bench.errors import UserError

KEYS = ("hf_tokenizer_path", "tokenizer_name")
_ENDS = ("[EOS]", "<|endoftext|>", "<|bos|>", "</s>", "<s>")


def tokenizer_of(folder: Path, configs: Sequence[str]) -> Any:
    """The tokenizer in a folder, else the folder or hub name that one of its configs gives under `hf_tokenizer_path`.

    Raises UserError with one line where there is none or it cannot be had.
    """
    from transformers import AutoTokenizer

    if (folder / "tokenizer.json").is_file():
        return _from_files(folder)
    name = next((name for config in configs if (folder / config).is_file() for name in _named(read_yaml(folder / config))), None)
    if name is None:
        raise UserError(f"{folder} names no tokenizer: put tokenizer.json there, or {KEYS[0]} (a folder or a hub name) into {configs[0]}")
    for place in (folder / name, Path(name).expanduser()):
        if place.is_dir():
            return _from_files(place)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"cannot fetch the tokenizer '{name}' ({reason}); without network put its tokenizer.json into {folder}") from None


def _from_files(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        made = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:
        raise UserError(f"cannot read the tokenizer in {folder} ({type(error).__name__}): it needs tokenizer.json") from None
    made.eos_token = next((token for token in _ENDS if token in made.get_vocab()), None)
    return made


def _named(config: Any) -> Iterator[str]:
    """Tokenizer names anywhere in a config, those of its top level first."""
    if isinstance(config, dict):
        yield from (config[key] for key in KEYS if isinstance(config.get(key), str))
        for value in config.values():
            yield from _named(value)
