"""What a wheel holds: every package, and every file that is no code."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_and_every_file_that_is_no_code_is_in_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "decomp_bench"
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in package.rglob("__init__.py")}
    assert folders <= set(setup["packages"])
    given = {path for pattern in setup["package-data"]["decomp_bench"] for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others
    assert others <= given
