"""Panels, legends and a caption stacked on a figure whose height follows from them, so that nothing covers the data."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend

TEXT = 6.0  # points; nothing on a figure is smaller
LEFT, RIGHT, TOP, GAP = 0.50, 0.12, 0.20, 0.16  # inches beside, above and between panels
BELOW = 0.38  # inches for tick labels and the x label
EDGE = 0.06  # inches beside legends and caption
SPACE = 0.05  # inches between legends


@dataclass(frozen=True)
class Entries:
    """One titled group of the legend."""

    title: str
    handles: list[Artist]
    labels: list[str]


def shortened(text: str, most: int) -> str:
    """The text with its middle left out where it is too long."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[len(text) - most // 2 :]}"


def _legend(figure: Figure, entries: Entries, columns: int) -> Legend:
    """A legend without a frame, in the figure's coordinates."""
    return figure.legend(
        entries.handles,
        [shortened(label, int(figure.get_figwidth() * 16)) for label in entries.labels],
        title=entries.title,
        ncols=columns,
        loc="upper left",
        alignment="left",
        frameon=False,
        fontsize=TEXT,
        title_fontproperties={"size": TEXT, "weight": "bold"},
        borderpad=0,
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=2.6,
        handletextpad=0.5,
        labelspacing=0.3,
    )


def _fitting(figure: Figure, entries: Entries) -> tuple[Legend, float]:
    """The legend with as many columns as fit the width, and its height in inches."""
    for columns in range(min(len(entries.handles), 6), 0, -1):
        legend = _legend(figure, entries, columns)
        box = legend.get_window_extent()
        if columns == 1 or box.width / figure.dpi <= figure.get_figwidth() - 2 * EDGE:
            return legend, box.height / figure.dpi
        legend.remove()
    raise ValueError(f"no entries under {entries.title!r}")


def _caption(figure: Figure, text: str) -> float:
    """Write the caption, wrapped to the width; returns its height in inches."""
    room = (figure.get_figwidth() - 2 * EDGE) * 0.985  # renderers differ in hinting
    for width in range(int(room * 28), 10, -1):
        artist = figure.text(0, 0, textwrap.fill(text, width), fontsize=TEXT, va="top", linespacing=1.15, gid="caption")
        box = artist.get_window_extent()
        if box.width / figure.dpi <= room:
            return box.height / figure.dpi
        artist.remove()
    raise ValueError("the figure is too narrow for a caption")


def canvas(panels: int, width: float, height: float) -> Figure:
    """A figure of `panels` axes beside each other, `height` inches each, that share both axes; `finish` gives it its real size."""
    figure = Figure(figsize=(width, height), dpi=300)
    FigureCanvasAgg(figure)
    figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)
    for axes in figure.axes:
        axes.tick_params(labelsize=TEXT, length=2, pad=2, width=0.5, which="major")
        axes.tick_params(labelsize=TEXT, length=1.2, pad=2, width=0.4, which="minor")
        axes.grid(True, which="major", linewidth=0.3, color="#dddddd")
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_linewidth(0.5)
    return figure


def finish(figure: Figure, height: float, groups: list[Entries], text: str, left: float = LEFT) -> None:
    """Put legends and caption below the panels, `left` inches from the edge, and make the figure as high as all of them need."""
    placed = [_fitting(figure, entries) for entries in groups]
    caption_height = _caption(figure, text)
    legends = sum(tall + SPACE for _, tall in placed)
    total = TOP + height + BELOW + legends + caption_height + 2 * SPACE
    width = figure.get_figwidth()
    figure.set_size_inches(width, total)
    count = len(figure.axes)
    wide = (width - left - RIGHT - GAP * (count - 1)) / count
    for index, axes in enumerate(figure.axes):
        start = left + index * (wide + GAP)
        axes.set_position((start / width, (total - TOP - height) / total, wide / width, height / total))
    below = total - TOP - height - BELOW
    for legend, tall in placed:
        legend.set_bbox_to_anchor((EDGE / width, below / total), transform=figure.transFigure)
        below -= tall + SPACE
    caption = next(artist for artist in figure.texts if artist.get_gid() == "caption")
    caption.set_position((EDGE / width, below / total))
