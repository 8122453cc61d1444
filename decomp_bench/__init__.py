"""One suite that trains, scores and draws sparse decompositions of neural networks under one protocol.

The public names are imported when they are first used, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decomp_bench.api import align_runs, evaluate_run, load_results, load_run, load_target, run_experiment, train_run
    from decomp_bench.decomposer import Decomposer

__version__ = "0.1.0"
__all__ = ["Decomposer", "align_runs", "evaluate_run", "load_results", "load_run", "load_target", "run_experiment", "train_run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("decomp_bench.decomposer" if name == "Decomposer" else "decomp_bench.api"), name)
    raise AttributeError(f"module 'decomp_bench' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
