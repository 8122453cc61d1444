"""The metric catalogue: one idea a file. Imports no torch."""

from __future__ import annotations

from typing import Any

from decomp_bench.metrics import behaviour, fidelity, liveness, recovery, sparsity
from decomp_bench.metrics.base import Context, Metric, SiteInfo

__all__ = ["CATALOGUE", "Context", "Metric", "SiteInfo", "metric_catalogue", "metric_versions"]

CATALOGUE: dict[str, Metric] = {
    m.key: m for m in (*behaviour.METRICS, *fidelity.METRICS, *sparsity.METRICS, *liveness.METRICS, *recovery.METRICS)
}
UNINTERVALLED = {m.key for m in (*liveness.METRICS, *recovery.METRICS)}
"""Metrics that are not functions of per-document sums."""
HEADLINE = {"lm": "ce_delta", "regression": "output_mse"}


def metric_catalogue() -> list[dict[str, Any]]:
    """Every metric's declaration, for listings."""
    shown = ("key", "title", "unit", "direction", "formula", "source", "version", "task", "control", "needs", "blind")
    return [{name: getattr(metric, name) for name in shown} for metric in CATALOGUE.values()]


def metric_versions() -> dict[str, int]:
    """Metric -> version of its definition; enters every run id."""
    return {metric.key: metric.version for metric in CATALOGUE.values()}
