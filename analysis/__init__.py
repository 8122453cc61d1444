"""Figures and tables from a results frame. Imports no torch and knows no method by name."""

from .export import caption_of, save
from .labels import MEASURES, Measure, described
from .measurements import measured_figures, measured_heading, measured_table
from .pareto import pareto, paretos
from .points import PROTOCOLS, Points, View, points
from .style import Style, styles
from .summary import Comparison, Crossing, Violation, crossings, floor_check, monotone_check, table

__all__ = [
    "MEASURES",
    "PROTOCOLS",
    "Comparison",
    "Crossing",
    "Measure",
    "Points",
    "Style",
    "View",
    "Violation",
    "caption_of",
    "crossings",
    "described",
    "floor_check",
    "measured_figures",
    "measured_heading",
    "measured_table",
    "monotone_check",
    "pareto",
    "paretos",
    "points",
    "save",
    "styles",
    "table",
]
