"""The figure: tokens a second by architecture and library."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from decomp_bench.analysis.export import save
from decomp_bench.analysis.style import COLOURS, plain


def draw(table: pd.DataFrame, settings: dict, folder: Path) -> None:
    """Horizontal bars, one group for each architecture, as PNG, SVG and PDF."""
    with plain():
        save(_bars(table, settings), folder / "figures" / "throughput")


def _bars(table: pd.DataFrame, settings: dict) -> plt.Figure:
    architectures = list(dict.fromkeys(table["architecture"]))[::-1]
    libraries = list(dict.fromkeys(table["library"]))
    height = 0.8 / len(libraries)
    figure, axes = plt.subplots(figsize=(5.5, 0.6 + 0.55 * len(architectures)), layout="constrained")
    for place, library in enumerate(libraries):
        own = table[table["library"] == library].set_index("architecture")["tokens_per_s"]
        at = [architectures.index(name) + 0.4 - height * (place + 0.5) for name in own.index]
        axes.barh(at, own / 1e3, height, color=COLOURS[place % len(COLOURS)], label=library.replace("_", "-"))
    axes.set_yticks(range(len(architectures)), architectures)
    axes.set_xlabel("thousand training tokens / s")
    axes.set_title(
        f"d {settings['width']}, F {settings['features']:,}, k {settings['k']}, batch {settings['batch']}, {settings['precision']}, "
        f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}; fastest of {settings['turns']} alternating turns",
        fontsize=7,
    )
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
