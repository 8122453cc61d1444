"""Texts from files of this machine, one after another, so that no file has to fit into memory unless it is one JSON value."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import zstandard

from decomp_bench.data.documents import Document
from decomp_bench.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
"""Kinds of files; all but .parquet may also be compressed, as .jsonl.gz."""
COMPRESSED = (".gz", ".zst")
IN_FOLDERS = (".txt", ".jsonl", ".parquet", ".csv")
"""What a folder is searched for: a .json there is as often a config as a text, so it is named itself or by a glob."""
HELP = f"data.source takes {', '.join(SUFFIXES)} files (also with {' or '.join(COMPRESSED)}), a folder or a glob of them, or hf:NAME"
AT_ONCE = 1000
"""Table rows read together."""


def text_name(text: str) -> str:
    """The name of a document that has no other: 16 hex digits of the hash of its text, so that duplicates fall into one split."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def kind_of(file: Path) -> str:
    """The suffix that says how a file is read, without .gz."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def place(source: str) -> Path:
    """A path or glob with its variables and ~ filled in."""
    return Path(os.path.expandvars(source)).expanduser()


def absolute(source: str) -> str:
    """A data source as it is found from any working folder; names that are no path stay as they are."""
    scheme = "hf:" if source.startswith("hf:") else ""
    path = place(source.removeprefix(scheme))
    named = source == "pydocs" or (scheme and not path.is_dir())
    return source if named else f"{scheme}{path.resolve()}"


def stem(source: str) -> str:
    """What a source is called in results: its file name without suffix, or the folder of a glob."""
    path = place(source)
    if glob.has_magic(str(path)) and not path.exists():
        return next((part for part in reversed(path.parts) if not glob.has_magic(part) and part != path.anchor), "text")
    return label_of(path)


def label_of(file: Path) -> str:
    """A file's name without suffixes that say how it is read: the label of its documents."""
    return Path(file.stem).stem if file.suffix in COMPRESSED else file.stem


def files_of(source: str) -> list[Path]:
    """The files that a path, a folder or a glob stands for, sorted; raises UserError where there are none."""
    path = place(source)
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.is_file() and kind_of(f) in IN_FOLDERS)
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
    if not found:
        raise UserError(f"no text in {path}: it has no {', '.join(IN_FOLDERS)} file" if path.is_dir() else f"no data at {path}: {HELP}")
    wrong = next((f for f in found if kind_of(f) not in SUFFIXES), None)
    if wrong is not None:
        raise UserError(f"{wrong}: {HELP}")
    return found


def fingerprint(files: list[Path]) -> list[list[Any]]:
    """What changes when a file does: path, size and time of change of each."""
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def texts(file: Path, column: str) -> Iterator[str | None]:
    """The texts of a file in its order; None or a blank one where a record has none.

    A .txt file gives its blank-line paragraphs gathered to about 2,000 characters; a table or JSON gives a column. Raises UserError for a
    broken file and for a missing column.
    """
    reader = {".txt": _paragraphs, ".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}[kind_of(file)]
    try:
        yield from reader(file, column)
    except UserError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"cannot read {file} as {kind_of(file)[1:]}: {type(error).__name__}: {first}") from None


def read_documents(source: str, column: str) -> list[Document]:
    """All documents of a path, a folder or a glob, at once; blank ones are left out. Raises UserError where nothing is left."""
    found = [Document(text_name(text), label_of(f), text) for f in files_of(source) for text in texts(f, column) if text and text.strip()]
    if not found:
        raise UserError(f"no text in {place(source)}: every document is empty")
    return found


def _open(file: Path) -> TextIOWrapper:
    if file.suffix == ".zst":
        return zstandard.open(file, "rt", encoding="utf-8")
    return TextIOWrapper(gzip.open(file), encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")


def _paragraphs(file: Path, _column: str, size: int = 2000) -> Iterator[str]:
    with _open(file) as stream:
        text = stream.read()
    gathered = ""
    for paragraph in text.split("\n\n"):
        gathered += ("\n\n" if gathered else "") + paragraph
        if len(gathered) >= size:
            yield gathered
            gathered = ""
    if gathered.strip():
        yield gathered


def _lines(file: Path, column: str) -> Iterator[str | None]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _value(json.loads(line), column, f"{file} line {number}")


def _json(file: Path, column: str) -> Iterator[str | None]:
    """A list of records or of texts, one record, or, as many hub files are, one record a line."""
    with _open(file) as stream:
        text = stream.read()
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _lines(file, column)
        return
    for number, record in enumerate(data if isinstance(data, list) else [data], 1):
        yield record if isinstance(record, str) else _value(record, column, f"{file} record {number}")


def _value(record: Any, column: str, where: str) -> str | None:
    if not isinstance(record, dict) or column not in record:
        has = ", ".join(map(str, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f"{where} has no key '{column}'; it has {has or 'none'}: set data.column")
    return None if record[column] is None else str(record[column])


def missing_column(where: object, column: str, names: list[str]) -> UserError:
    """The error of a table that lacks the column asked for."""
    return UserError(f"{where} has no column '{column}'; it has {', '.join(names) or 'none'}: set data.column")


def _csv(file: Path, column: str) -> Iterator[str | None]:
    import pandas as pd

    for table in pd.read_csv(file, chunksize=AT_ONCE, dtype=str, keep_default_na=False):
        if column not in table:
            raise missing_column(file, column, [str(name) for name in table.columns])
        yield from (str(text) for text in table[column])


def _parquet(file: Path, column: str) -> Iterator[str | None]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if column not in names:
            raise missing_column(file, column, names)
        for batch in table.iter_batches(AT_ONCE, columns=[column]):
            yield from (None if text is None else str(text) for text in batch.column(0).to_pylist())
