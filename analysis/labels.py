"""How metrics are named on axes and in captions; callers that know better (the metric catalogue) pass their own `measures`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Measure(NamedTuple):
    """An axis label and the definition that a caption gives."""

    label: str
    definition: str


MEASURES: dict[str, Measure] = {
    "l0_module": Measure("Active components per module", "mean active components of a site, mean over the MLPs' sites"),
    "l0_mlp": Measure("Active components per MLP", "sum over its sites of mean active components, times the layers that a site writes to"),
    "active_params": Measure(
        "Active parameters per MLP", "scalars in the read and write vectors of active components, and what is always on"
    ),
    "bits": Measure("Description bits per MLP", "bits that name the active components and their coefficients, and what is always on"),
    "ce_delta": Measure("Cross-entropy increase (nats/token)", "CE of the replaced model minus CE of the target, on the same tokens"),
    "kl": Measure("KL from clean (nats/token)", "mean KL from the target's to the replaced model's next-token distribution"),
    "fvu": Measure(
        "Fraction of variance unexplained", "squared error of the output over its variance about the training mean, mean over layers"
    ),
}


def described(catalogue: Iterable[Mapping[str, Any]]) -> dict[str, Measure]:
    """Labels and definitions from a metric catalogue whose entries have key, title, unit and formula."""
    return {
        entry["key"]: Measure(f"{entry['title']} ({entry['unit']})" if entry["unit"] else entry["title"], entry["formula"])
        for entry in catalogue
    }


def measure(key: str, measures: Mapping[str, Measure] | None = None) -> Measure:
    """The label and definition of a metric; a metric that nobody described is called by its key."""
    return (measures or {}).get(key) or MEASURES.get(key) or Measure(key, key)
