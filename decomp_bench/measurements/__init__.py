"""Measurements beyond the metric catalogue: what experiments ask of trained runs, one module each, imported when asked for.

`measure: {NAME: {settings}}` in an experiment's config gives every run the measurement NAME: the `MEASUREMENT` of this package's module
of that name, or an entry point `decomp_bench.measurements` of another package. Imports no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.config import Config, digest, parse
from decomp_bench.errors import UserError
from decomp_bench.registry import suggest

if TYPE_CHECKING:
    from decomp_bench.data.sources import Source
    from decomp_bench.decomposer import Decomposer

__all__ = ["Asked", "Measured", "Measurement", "Progress", "asked", "measurement", "names"]

GROUP = "decomp_bench.measurements"
Progress = Callable[[int, int], None]
"""Called with the parts done and the parts in all."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """One metric of a measurement, as in the catalogue."""

    key: str
    title: str
    unit: str
    direction: str
    """lower, higher or none: which way is better."""
    formula: str
    blind: str = ""
    """What it cannot tell from a decomposition of the target, as in the catalogue."""


@dataclass(frozen=True)
class Measurement:
    """A way to measure a trained run.

    `measure(decomposer, source, settings, progress)` returns rows in the columns of `decomp_bench.results`: at least metric, value, lo, hi,
    n, protocol, gates and condition; what they leave out is filled in for the run. A row with an empty `run_id` is about the target
    and its data, such as a baseline: it comes out the same for every run, and is kept once.
    """

    version: int
    """Raised whenever rows come out otherwise: rows of another version are measured again."""
    Settings: type[Config]
    measure: Callable[[Decomposer, Source, Any, Progress], Rows]
    metrics: tuple[Measured, ...]
    seconds: Callable[[Any], float]
    """What one run takes on one core under some settings, roughly, on the embedded target."""


@dataclass(frozen=True)
class Asked:
    """A measurement that an experiment asks for, with every setting filled in."""

    name: str
    measurement: Measurement
    settings: Config

    @property
    def key(self) -> str:
        """Hash of the settings and the measurement's version."""
        return digest([self.measurement.version, self.settings.model_dump(mode="json")])

    def file(self, run: Path) -> Path:
        """Where a run folder holds the rows."""
        return run / f"{self.name}-{self.key}.parquet"

    @property
    def seconds(self) -> float:
        """Estimated seconds for one run."""
        return self.measurement.seconds(self.settings)


def names() -> list[str]:
    """Every measurement's name, without importing any."""
    own = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return sorted({*own, *(entry.name for entry in entry_points(group=GROUP))})


def measurement(name: str) -> Measurement:
    """A measurement by name; raises UserError for an unknown one."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return entry.load()
    if name not in names():
        raise UserError(f"unknown measurement '{name}'; {suggest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}").MEASUREMENT


def asked(measure: Mapping[str, Mapping[str, Any]], where: str) -> list[Asked]:
    """Measurements by name with their settings; raises UserError for an unknown name, key or value."""
    found = {name: measurement(name) for name in measure}
    return [Asked(name, one, parse(one.Settings, measure[name], f"{where}, measure {name}")) for name, one in found.items()]
