"""From a template to an HTML file: escaped, self-contained, written whole or not at all."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from decomp_bench.files import write_text

NAME = "report.html"
"""What a page is called, beside what it shows."""
NOTHING = "–"
VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→"})


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("decomp_bench.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"number": number, "count": count, "visible": visible}
    made.globals |= {"source": _source}
    return made


def _source(name: str) -> Markup:
    """The text of a style sheet or script beside the templates, which goes into the page as it is."""
    environment = _environment()
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def write(template: str, path: Path, **context: Any) -> Path:
    """Fill a template and write the page; everything in the context is escaped but Markup."""
    write_text(_environment().get_template(template).render(**context), path)
    return path


def link(page: Path, other: Path) -> str:
    """The relative address of a file as seen from a page; empty where it is not there."""
    return Path(os.path.relpath(other, page.parent)).as_posix() if other.is_file() else ""


def number(value: Any, digits: int = 3) -> str:
    """A number for reading, such as 0.177, 8,192 or 2.1e-05; a dash where there is none."""
    if value is None or not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return NOTHING
    size = abs(value)
    if size >= 10 ** (digits + 6):
        return f"{value:.{digits - 1}e}"
    if size >= 10 ** (digits - 1) or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if size < 1e-4 else f"{value:.{max(digits - 1 - math.floor(math.log10(size)), 0)}f}"


def visible(text: str) -> str:
    """Text in which line ends and tabs are seen."""
    return text.translate(VISIBLE)


def count(value: int, noun: str) -> str:
    """Such as `1 run` or `2,000 runs`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"
