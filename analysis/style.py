"""Colours and markers, given out in the sorted order of the families present, so that no family is known by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import pandas as pd
from matplotlib.colors import to_hex, to_rgb

from .points import tidy

# Okabe and Ito's colours without black and yellow, then two of Tol's muted ones: none is grey, and all carry a lighter tint.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
GREY = "#686868"
MARKERS = {"replacement": "osD^vph", "autoencoding": "*PX", "floor": "<>d8H"}
SIZES = {"*": 1.5, "P": 1.15, "X": 1.15}  # so that all look equally large
GROUPS = {
    "replacement": "Replacement (computes y from u)",
    "autoencoding": "Autoencoding (sees y; not ranked with replacements)",
    "floor": "Floors (nothing trained)",
}


@dataclass(frozen=True)
class Style:
    """How the curves of a family look; `light` is the tint for gates of the replaced stream."""

    label: str
    group: str
    colour: str
    light: str
    marker: str
    size: float = 1.0


def tint(colour: str, white: float = 0.5) -> str:
    """The colour mixed with white."""
    red, green, blue = (channel + (1 - channel) * white for channel in to_rgb(colour))
    return to_hex((red, green, blue))


def styles(frame: pd.DataFrame) -> dict[tuple[str, str], Style]:
    """
    (family, kind) -> style for every family of a results frame. Pass the whole frame, so that figures of parts of it agree.
    Families beyond the palette take its colours again with other markers.
    """
    known = tidy(frame[["family", "kind", "trainable"]]).drop_duplicates()
    families = sorted({(str(family), str(kind), bool(trainable)) for family, kind, trainable in known.itertuples(index=False)})
    looks: dict[tuple[str, str], Style] = {}
    coloured, marked = 0, dict.fromkeys(MARKERS, 0)
    for family, kind, trainable in families:
        shape = "autoencoding" if kind == "autoencoding" else "replacement" if trainable else "floor"
        marker = MARKERS[shape][marked[shape] % len(MARKERS[shape])]
        marked[shape] += 1
        colour = COLOURS[coloured % len(COLOURS)] if trainable else GREY
        coloured += trainable
        label = f"{family} (sees y)" if kind == "autoencoding" and "(sees y)" not in family else family
        group = shape if trainable else "floor"
        looks[family, kind] = Style(label, group, colour, tint(colour), marker, SIZES.get(marker, 1.0))
    return looks


@contextmanager
def plain() -> Iterator[None]:
    """matplotlib's own defaults with text kept as text, whatever the user's settings: the same frame gives the same bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "decomp-bench", "pdf.fonttype": 42, "font.size": 7})
        yield
