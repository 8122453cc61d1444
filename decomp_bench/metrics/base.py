"""What a metric is: key, unit, direction, formula, source, and a function from summed quantities to values. Imports no torch.

Evaluation sums quantities over each document's scored tokens. Every metric is a function of such sums, so one bootstrap over
documents gives every interval: sums are arrays [R] over resamples, entry 0 the documents as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Sums = Mapping[tuple[str, str], np.ndarray]
"""(quantity, part) -> [R]; the part is a layer, a site or `all`."""
Values = dict[tuple[str, str], np.ndarray]
"""(layer, site) -> [R]; `all` where a value belongs to no single one."""
AS_SPARSE = "junk of the same settings, which is as sparse or sparser (experiment 024)"
"""What counts are blind to."""


@dataclass(frozen=True)
class SiteInfo:
    """What the accounting knows of a site: its layer, unit (mlp or attn), size, and how many layers it writes to."""

    name: str
    layer: int
    unit: str
    n: int
    writes: int


@dataclass(frozen=True)
class Context:
    """What a condition's sums were measured on."""

    layers: tuple[int, ...]
    sites: tuple[SiteInfo, ...]
    task: str
    protocol: str
    constant_size: float = 0.0
    """Always-on scalars, summed over the replaced MLPs."""
    constant_coefficients: float = 0.0
    coefficient_bits: float = float("nan")
    """Bits a coefficient needs before the output changes (see `bits`)."""
    alive: Mapping[str, int] = field(default_factory=dict)
    """Components of each site that fired at least once."""

    def mlp_sites(self) -> list[SiteInfo]:
        """Sites that belong to MLPs; attention is accounted apart."""
        return [site for site in self.sites if site.unit == "mlp"]


@dataclass(frozen=True)
class Metric:
    """One entry of the catalogue."""

    key: str
    title: str
    unit: str
    direction: str
    """lower, higher or none: which way is better."""
    formula: str
    source: str
    compute: Callable[[Sums, Context], Values]
    version: int = 1
    task: str = "both"
    """lm, regression or both: the targets it applies to."""
    control: str = ""
    """The control that would expose it."""
    needs: str = ""
    """Why it may be missing."""
    blind: str = ""
    """What it cannot tell from a decomposition of the target, so that it measures no quality by itself; empty: nothing known."""


def parts(sums: Sums, name: str) -> list[str]:
    """The parts that a quantity was summed for."""
    return [part for (quantity, part) in sums if quantity == name]


def per_part(sums: Sums, value: Callable[[str], np.ndarray], name: str) -> Values:
    """A value for each part of a quantity. With layers as parts (protocol single), `all` is their unweighted mean."""
    found = {part: value(part) for part in parts(sums, name)}
    values: Values = {(part, "all"): array for part, array in found.items()}
    if found and "all" not in found:
        values["all", "all"] = np.mean(list(found.values()), axis=0)
    return values


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where the bottom is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom != 0, top / np.where(bottom != 0, bottom, 1), np.nan)
