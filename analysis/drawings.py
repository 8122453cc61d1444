"""What an experiment can ask to have drawn of its runs, by name."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from .grid import Drawing, protocol_grid
from .pareto import paretos
from .points import PROTOCOLS, View
from .recovery import recovery

AXES = ("l0_module", "l0_mlp", "active_params")
"""A component's count per matrix, per MLP, and in scalars: the order of methods depends on which is taken."""
FIDELITY = ("ce_delta", "fvu")


def sweeps(frame: pd.DataFrame) -> Drawing:
    """Every inference-time sweep beside what was trained, against three x axes."""
    there = tuple(name for name in PROTOCOLS if name in set(frame["protocol"]))
    wanted = [tuple(key for key in keys if key in set(frame["metric"])) for keys in (AXES, FIDELITY)]
    return Drawing(paretos(frame, View(protocols=there), xs=wanted[0], ys=wanted[1], sweeps="all"), {})


DRAWINGS: dict[str, Callable[[pd.DataFrame], Drawing]] = {"protocol_grid": protocol_grid, "recovery": recovery, "sweeps": sweeps}
