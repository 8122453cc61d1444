"""One suite that trains, scores and draws sparse decompositions of neural networks under one protocol.

The public names are `Decomposer`, `train`, `evaluate`, `load_run`, `load_target`, `results` and `run_experiment`. They are
imported when they are first used, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decomp_bench.api import load_run, load_target, run_experiment
    from decomp_bench.decomposer import Decomposer

__version__ = "0.1.0"
__all__ = ["Decomposer", "load_run", "load_target", "run_experiment"]

_NAMES = {"Decomposer": "decomposer", "load_run": "api", "load_target": "api", "run_experiment": "api"}
_CALLABLE = ("train", "evaluate", "results")
"""Names that are a module of this package and a public function of `decomp_bench.api` as well: the module can be called."""


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from decomp_bench import api

        return getattr(api, self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"decomp_bench.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"decomp_bench.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'decomp_bench' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_CALLABLE})
