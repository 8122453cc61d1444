"""The corpus `pydocs`: the documentation that every installation of this project carries.

Docstrings of the standard library and of the pinned dependencies, and the prose of `pydoc_data.topics`, read from the
installed files with `ast` (nothing is imported, nothing is downloaded). One document is the documentation of one file.
"""

from __future__ import annotations

import ast
import gc
import gzip
import hashlib
import importlib.metadata
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from decomp_bench.data.cache import cache_dir
from decomp_bench.data.documents import Document
from decomp_bench.files import write_bytes

SPLITS = ("train", "validation", "test")
FORMAT = 1  # raise when the text of a document changes for the same installed file
HELD_OUT = 0.025  # share of the files in each of validation and test
MIN_CHARS = 200
# Distribution -> import name. Only distributions that the set-up pins: another version is another text.
PACKAGES: dict[str, str] = {
    "datasets": "datasets",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "pydantic": "pydantic",
    "rich": "rich",
    "sae-lens": "sae_lens",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "torch": "torch",
    "transformer-lens": "transformer_lens",
    "transformers": "transformers",
    "wandb": "wandb",
}
MANIFEST = Path(__file__).parent.parent / "assets" / "pydocs" / "manifest.json.gz"
_SKIPPED_PARTS = {
    "tests",
    "test",
    "testing",
    "externals",
    "vendor",
    "vendored",
    "_vendor",
    "conftest",
    "array_api_compat",
    "array_api_extra",
}
# One model's documentation is the next one's with the name changed: held-out files would be training text.
_SKIPPED_MODULES = ("transformers.models.", "transformer_lens.model_bridge.supported_architectures.")
# Left out of the standard library: what Linux distributions split off, and what is not documentation.
_SKIPPED_STDLIB = {"idlelib", "lib2to3", "turtledemo", "distutils", "ensurepip", "pydoc_data", "site-packages", "dist-packages"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def split_of(name: str) -> str:
    """The split of a document: a hash of its name and of nothing else, so that an edited text stays where it was."""
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"


def text_hash(text: str) -> str:
    """12 hex digits of the sha256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Installed version of Python and of each package of the corpus; a package that is absent is absent here."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for distribution in PACKAGES:
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def clean(doc: str) -> str:
    """A docstring without its indentation. Written out here because inspect.cleandoc differs between Python versions."""
    lines = [line.rstrip() for line in doc.expandtabs().splitlines()]
    rest = [line for line in lines[1:] if line]
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest), default=0)
    body = [lines[0].lstrip(" "), *(line[margin:] for line in lines[1:])] if lines else []
    return "\n".join(body).strip("\n")


def _heading(node: ast.AST, qualified: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {qualified}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    spec = node.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args)]
    names += [f"*{spec.vararg.arg}"] if spec.vararg else ["*"] if spec.kwonlyargs else []
    names += [a.arg for a in spec.kwonlyargs] + ([f"**{spec.kwarg.arg}"] if spec.kwarg else [])
    return f"{qualified}({', '.join(names)})"


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of every class and function below a node, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            qualified = prefix + child.name
            doc = ast.get_docstring(child, clean=False)
            if doc and (cleaned := clean(doc)):
                yield _heading(child, qualified), cleaned
            yield from _walk(child, f"{qualified}.")
        elif isinstance(child, ast.If | ast.Try | ast.With):  # definitions that depend on the platform or on an import
            yield from _walk(child, prefix)


def docstrings(source: str, name: str) -> list[tuple[str, str]]:
    """(heading, docstring) pairs of a Python source text; empty when it does not parse.

    `name` is the dotted name of the module and becomes the first heading.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return []
    doc = clean(ast.get_docstring(tree, clean=False) or "")
    return ([(name, doc)] if doc else []) + list(_walk(tree, ""))


def _is_documentation(module: str) -> bool:
    parts = module.split(".")
    tests = any(part.startswith("test_") or part.endswith("_test") for part in parts)
    return not tests and not _SKIPPED_PARTS & set(parts) and not module.startswith(_SKIPPED_MODULES)


def _files() -> Iterator[tuple[str, str, Path]]:
    """(dotted name, label, path) of each file, packages first: their text then never depends on the standard library's."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for distribution, package in sorted(PACKAGES.items(), key=lambda item: item[1]):
        try:
            root = Path(str(importlib.metadata.distribution(distribution).locate_file(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
        for module, path in _modules(root, root.parent):
            parts = module.split(".")
            subpackage = len(parts) > 2 or path.name == "__init__.py"
            yield module, ".".join(parts[:2]) if subpackage else parts[0], path
    for module, path in _modules(stdlib, stdlib):
        if module.split(".")[0] not in _SKIPPED_STDLIB:
            yield module, module.split(".")[0], path


def _modules(root: Path, base: Path) -> list[tuple[str, Path]]:
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(base).with_suffix("")
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        module = ".".join(parts)
        if all(part.isidentifier() for part in parts) and _is_documentation(module):
            found.append((module, path))
    return sorted(found)


def topics(source: str) -> list[Document]:
    """The reference texts of `pydoc_data.topics`, one document each, from the source text of that module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict) and len(node.keys) > 10:
            table = ast.literal_eval(node)
            return [Document(f"pydoc_data.topics.{key}", "pydoc_data.topics", clean(text)) for key, text in sorted(table.items())]
    return []


def merge(files: Iterable[tuple[str, str, str]]) -> list[Document]:
    """Documents from (dotted name, label, source) triples; a docstring counts in the first file that has it."""
    seen: set[str] = set()
    found = []
    for module, label, source in files:
        parts = []
        for heading, doc in docstrings(source, module):
            if doc not in seen:
                seen.add(doc)
                parts.append(f"{heading}\n\n{doc}\n")
        found.append(Document(module, label, "\n".join(parts)))
    return [d for d in found if len(d.text) >= MIN_CHARS]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").replace("\x00", "")
    except (OSError, UnicodeDecodeError):
        return ""


def extract() -> list[Document]:
    """Every document of this installation, sorted by name; about twenty seconds, without the cache and the manifest."""
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are many small objects without cycles: collecting between them takes a fifth of the time
    try:
        found = merge((module, label, _read(path)) for module, label, path in _files())
    finally:
        if collecting:
            gc.enable()
    prose = topics(_read(Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py") or "{}")
    return sorted([*found, *(d for d in prose if len(d.text) >= MIN_CHARS)], key=lambda d: d.name)


def extract_cached() -> list[Document]:
    """What `extract` returns, kept in the cache folder under the versions of what it was read from."""
    key = hashlib.sha256(json.dumps([FORMAT, versions()], sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / f"pydocs-{key}.json"
    if not path.exists():
        rows = [[d.name, d.label, d.text] for d in extract()]
        write_bytes(json.dumps(rows).encode(), path)
    return [Document(*row) for row in json.loads(path.read_bytes())]


def hash_of(found: Iterable[Document]) -> str:
    """16 hex digits that stand for the names and the texts of some documents, in any order."""
    lines = sorted(f"{d.name} {text_hash(d.text)}\n" for d in found)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def manifest(path: Path = MANIFEST) -> dict[str, Any] | None:
    """The committed record: format, versions, hash (of the whole) and documents (name -> text hash); None where absent."""
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else None


def write_manifest(path: Path = MANIFEST) -> dict[str, Any]:
    """Record the documents of this installation as the reference; the embedded target must then be trained again."""
    found = extract_cached()
    record = {"format": FORMAT, "versions": versions(), "hash": hash_of(found), "documents": {d.name: text_hash(d.text) for d in found}}
    write_bytes(gzip.compress(json.dumps(record, separators=(",", ":")).encode(), 9, mtime=0), path)
    return record


def checked(found: list[Document], record: dict[str, Any] | None) -> list[Document]:
    """The documents whose text is the manifest's; one warning says how many were left out, and why that may be."""
    if record is None:
        return found
    known = record["documents"]
    kept = [d for d in found if known.get(d.name) == text_hash(d.text)]
    if len(kept) < len(known):
        here, there = versions(), record["versions"]
        other = [f"{name} {here.get(name, 'absent')} for {version}" for name, version in there.items() if here.get(name) != version]
        cause = f" ({', '.join(other)})" if other else ""
        warnings.warn(
            f"pydocs: {len(known) - len(kept)} of {len(known)} files are not the manifest's and are left out{cause}", stacklevel=2
        )
    return kept


@cache
def _used() -> tuple[Document, ...]:
    return tuple(checked(extract_cached(), manifest()))


def documents(split: str) -> list[Document]:
    """The documents of a split (train, validation or test), sorted by name."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    return [d for d in _used() if split_of(d.name) == split]


def corpus_hash() -> str:
    """The hash of the documents that are really used here; rows of different hashes are not compared."""
    return hash_of(_used())
