"""Names to methods: one file of methods/ each, or an entry point `decomp_bench.methods` of another package; imported when asked for."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from decomp_bench.errors import UserError

if TYPE_CHECKING:
    from decomp_bench.decomposer import Decomposer


def suggest(name: str, known: list[str]) -> str:
    """A hint for a mistyped name: the closest known one and the list."""
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"known: {', '.join(known)}"


def _folders() -> list[Path]:
    """Folders of method files: the project's own, and those of DECOMP_BENCH_METHODS (os.pathsep between them)."""
    spec = importlib.util.find_spec("decomp_bench.methods")
    own = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return own + [Path(p) for p in os.environ.get("DECOMP_BENCH_METHODS", "").split(os.pathsep) if p]


def _files() -> dict[str, Path]:
    return {path.stem: path for folder in _folders() for path in sorted(folder.glob("[a-z]*.py"))}


def names() -> list[str]:
    """Every method's name, without importing any."""
    return sorted({*_files(), *(entry.name for entry in entry_points(group="decomp_bench.methods"))})


def method(name: str) -> type[Decomposer]:
    """The class of a method; raises UserError for an unknown name."""
    file = _files().get(name)
    if file is not None:
        try:
            module = _load(name, file)
        except (ImportError, SyntaxError) as error:
            raise UserError(f"{file} cannot be imported: {type(error).__name__}: {error}") from None
        from decomp_bench.decomposer import Decomposer

        found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Decomposer) and c.__dict__.get("name") == name]
        if len(found) != 1:
            raise UserError(f"{file} must define exactly one Decomposer whose name is '{name}'; it defines {len(found)}")
        return found[0]
    for entry in entry_points(group="decomp_bench.methods"):
        if entry.name == name:
            return entry.load()
    raise UserError(f"unknown method '{name}'; {suggest(name, names())}")


def _load(name: str, file: Path):
    qualified = f"decomp_bench.methods.{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    if file.parent == _folders()[0]:
        return importlib.import_module(qualified)
    importlib.import_module("decomp_bench.methods")  # siblings of a method in another folder are the project's shared parts
    spec = importlib.util.spec_from_file_location(qualified, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[qualified]
        raise
    return module
