"""Pictures inside a page: figures from files, and small curves and histograms that follow the page's colours."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from decomp_bench.report.page import number

WIDTH, HEIGHT = 240, 120
"""Size of a panel in its own units."""
NARROW = 300
"""Points below which a figure was drawn for a column."""


class Picture(NamedTuple):
    """A figure as a data address, with what it is called and what it says; `narrow` ones fit a column."""

    name: str
    title: str
    alt: str
    data: str
    narrow: bool


class Panel(NamedTuple):
    """A small curve or histogram: SVG path of the line, its marks on the axes, and its description."""

    title: str
    path: str
    bars: list[tuple[float, float, float, float]]
    x: tuple[str, str]
    y: tuple[str, str]
    alt: str


# ---- files


def pictures(folder: Path) -> list[Picture]:
    """Every figure of a folder, the fidelity by size first; of one in several formats the smallest that stays sharp, and of one that is
    also there for a single protocol the whole."""
    files = {path.stem: path for kind in ("*.png", "*.svg") for path in sorted(folder.glob(kind))}
    whole = {stem: path for stem, path in files.items() if stem.rpartition("_")[0] not in files}
    order = sorted(whole, key=lambda stem: (not stem.startswith(("ce_delta", "output_mse")), "active_params" not in stem, stem))
    return [picture(whole[stem]) for stem in order]


def picture(path: Path) -> Picture:
    """A PNG or SVG file; its caption, where it carries one, is what stands for it."""
    content, alt, kind, narrow = path.read_bytes(), "", "png", False
    if path.suffix == ".svg":
        text = content.decode()
        said = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
        alt, kind = html.unescape(said[1]) if said else "", "svg+xml"
        width = re.search(r'<svg[^>]* width="([\d.]+)pt"', text)
        narrow = width is not None and float(width[1]) < NARROW
        content = _lean(text).encode()
    title = _title(path.stem)
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(path.stem, title, " ".join(alt.split()) or title, data, narrow)


def _lean(text: str) -> str:
    """An SVG without what nobody sees: its metadata, its indentation, and decimals beyond a hundredth of a point."""
    text = re.sub(r"<!DOCTYPE.*?>|<metadata>.*?</metadata>|<\?xml.*?\?>", "", text, flags=re.DOTALL).lstrip()
    text = re.sub(r"\n\s*<", "\n<", text)
    shapes = re.compile(r"<(?:path|use)\b(?![^>]*\btransform)[^>]*>")
    return shapes.sub(lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)


def _title(stem: str) -> str:
    from decomp_bench import analysis

    y, by, x = stem.partition("_by_")
    names = analysis.described(_catalogue()) | analysis.MEASURES
    if by and y in names and x in names:
        return f"{names[y].label} against {names[x].label[:1].lower()}{names[x].label[1:]}"
    return stem.replace("_", " ").capitalize()


def _catalogue() -> list[dict]:
    from decomp_bench.metrics import metric_catalogue

    return metric_catalogue()


# ---- panels


def curve(title: str, xs: Sequence[float], ys: Sequence[float]) -> Panel | None:
    """A line of y over x, logarithmic in y where all are positive and span more than a decade; None without two finite points."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if len(points) < 2:
        return None
    low, high = min(y for _, y in points), max(y for _, y in points)
    log = low > 0 and high / low > 10
    scale = math.log if log else float
    first, span = points[0][0], (points[-1][0] - points[0][0]) or 1
    rise = (scale(high) - scale(low)) or 1
    at = [(WIDTH * (x - first) / span, HEIGHT * (1 - (scale(y) - scale(low)) / rise)) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    alt = f"{title}: {number(points[0][1])} at step {number(first)}, {number(points[-1][1])} at step {number(points[-1][0])}"
    name = f"{title} (logarithmic)" if log else title
    return Panel(name, path, [], (number(first), number(points[-1][0])), (number(low), number(high)), alt)


def histogram(title: str, counts: Sequence[int], ends: tuple[str, str]) -> Panel:
    """Bars of counts, side by side."""
    most, width = max([*counts, 1]), WIDTH / max(1, len(counts))
    bars = [
        (round(i * width, 1), round(HEIGHT * (1 - c / most), 1), round(width - 1, 1), round(HEIGHT * c / most, 1))
        for i, c in enumerate(counts)
    ]
    return Panel(title, "", bars, ends, ("0", number(most)), f"{title}: histogram of {number(sum(counts))} from {ends[0]} to {ends[1]}")
