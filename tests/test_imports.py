"""The import graph: who may know whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from decomp_bench.interop import FORMATS

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "decomp_bench").rglob("*.py"), *(ROOT / "methods").glob("*.py"), *(ROOT / "analysis").glob("*.py")])
METHODS = [path.stem for path in (ROOT / "methods").glob("[a-z]*.py")]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(("." * node.level) + node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path: Path):
    room = path.relative_to(ROOT).parts[0]
    names = imported(path)
    assert not any(name == "methods" or name.startswith(("methods.", "analysis")) for name in names)
    if room == "decomp_bench" and path.name != "registry.py":
        assert not any(name.startswith("decomp_bench.methods") for name in names), "methods are asked of the registry"
    if room == "methods":
        outside = {n for n in names if n.startswith("decomp_bench")}
        assert not {
            n for n in outside if n.split(".")[1] in ("train", "evaluate", "runs", "experiment", "launch", "cli", "metrics", "analysis")
        }
    if room == "analysis":
        assert {n for n in names if n.startswith("decomp_bench")} <= {"decomp_bench.results", "decomp_bench.errors"}
        assert "torch" not in names
    if path.is_relative_to(ROOT / "decomp_bench" / "metrics"):
        assert not {n for n in names if n.startswith(("decomp_bench.runs", "decomp_bench.cli", "decomp_bench.experiment"))}


NAMELESS = [p for p in FILES if p.relative_to(ROOT).parts[0] in ("decomp_bench", "analysis")]


@pytest.mark.parametrize("path", NAMELESS, ids=lambda p: p.name)
def test_no_method_is_named_outside_methods(path: Path):
    """Method names as string constants would be method-specific branches; docstrings may name examples, and a tool's format its tool."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in documentation]
    formats = set(FORMATS) if path.parent.name == "interop" else set()
    assert not [s for s in strings if s in METHODS and s not in formats]


@pytest.mark.parametrize(
    "module",
    [
        "decomp_bench",
        "decomp_bench.results",
        "decomp_bench.config",
        "decomp_bench.targets",
        "decomp_bench.metrics",
        "decomp_bench.analysis",
        "decomp_bench.cli",
        "decomp_bench.interop",
    ],
)
def test_light_modules_import_no_torch(module: str):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_and_functions_stay_small():
    long = [str(p.relative_to(ROOT)) for p in FILES if len(p.read_text().splitlines()) > 400]
    assert not long


def test_the_tests_that_the_tests_readme_names_are_there():
    folder = ROOT / "tests"
    named = set(re.findall(r"`(test_\w+)`", (folder / "README.md").read_text()))
    there = {name for file in folder.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)}
    assert len(named) > 24
    assert not named - there
