"""Figures and tables from a results frame. Imports no torch and knows no method by name."""

from .drawings import DRAWINGS
from .export import caption_of, save
from .grid import Drawing, grid_table
from .labels import MEASURES, Measure, described
from .measurements import measured_figures, measured_note, measured_table
from .model_table import model_table
from .noise import EVERY as EVERY_FAMILY
from .noise import noise_markdown, seed_noise
from .pareto import XS, pareto, paretos
from .points import PROTOCOLS, Points, View, points, told_apart
from .style import Style, styles
from .summary import Comparison, Crossing, Matched, Violation, crossings, floor_check, matched, monotone_check, table
from .toys import toy_figures
from .typeset import latex, markdown

__all__ = [
    "DRAWINGS",
    "EVERY_FAMILY",
    "MEASURES",
    "PROTOCOLS",
    "XS",
    "Comparison",
    "Crossing",
    "Drawing",
    "Matched",
    "Measure",
    "Points",
    "Style",
    "View",
    "Violation",
    "caption_of",
    "crossings",
    "described",
    "floor_check",
    "grid_table",
    "latex",
    "markdown",
    "matched",
    "measured_figures",
    "measured_note",
    "measured_table",
    "model_table",
    "monotone_check",
    "noise_markdown",
    "pareto",
    "paretos",
    "points",
    "save",
    "seed_noise",
    "styles",
    "table",
    "told_apart",
    "toy_figures",
]
