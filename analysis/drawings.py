"""What an experiment can ask to have drawn of its runs, by name."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from .grid import Drawing, protocol_grid

DRAWINGS: dict[str, Callable[[pd.DataFrame], Drawing]] = {"protocol_grid": protocol_grid}
