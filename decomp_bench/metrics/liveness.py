"""Which components are used at all. Counts over the evaluated tokens, without interval: they are extremes, not means."""

from __future__ import annotations

import numpy as np

from decomp_bench.metrics.base import AS_SPARSE, Context, Metric, Sums, Values

DENSE = 0.1


def _count(quantity: str):
    def compute(sums: Sums, context: Context) -> Values:
        found = {(str(site.layer), site.name): sums[quantity, site.name] for site in context.sites if (quantity, site.name) in sums}
        return {**found, **({("all", "all"): np.sum(list(found.values()), axis=0)} if found else {})}

    return compute


def _share(quantity: str):
    def compute(sums: Sums, context: Context) -> Values:
        sizes = {(str(site.layer), site.name): site.n for site in context.sites if (quantity, site.name) in sums}
        found = {
            (str(site.layer), site.name): sums[quantity, site.name] / site.n for site in context.sites if (quantity, site.name) in sums
        }
        whole = sum(found[key] * sizes[key] for key in found) / max(1, sum(sizes.values()))
        return {**found, **({("all", "all"): np.asarray(whole)} if found else {})}

    return compute


def _quantile(quantity: str):
    return lambda sums, _context: {("all", "all"): sums[quantity, "all"]} if (quantity, "all") in sums else {}


METRICS = [
    Metric(
        "alive",
        "Alive components",
        "",
        "none",
        "components that are active on at least one of the n scored tokens",
        "METRICS 5",
        _count("fired"),
        control="a random gate of density p leaves none dead once n >> 1/p",
    ),
    Metric(
        "dead",
        "Dead share",
        "",
        "lower",
        "share of components active on none of the n scored tokens",
        "METRICS 5",
        _share("silent"),
        blind="random components that are seldom off",
    ),
    Metric(
        "dense", "Dense share", "", "none", f"share of components active on more than {DENSE:.0%} of tokens", "METRICS 5", _share("dense")
    ),
    Metric(
        "effective",
        "Effective components",
        "",
        "none",
        "(sum_c m_c)^2 / sum_c m_c^2 of each site, m_c the mean |coefficient| |write vector|: the same criterion for every method",
        "participation ratio; VPD's alive counts depend on the criterion",
        _count("effective"),
        control="n equal components give n",
    ),
    Metric(
        "l0_median",
        "Median active per MLP",
        "",
        "lower",
        "median over tokens of the active components, each once, / MLPs",
        "METRICS 2",
        _quantile("l0_median"),
        blind=AS_SPARSE,
    ),
    Metric(
        "l0_p95",
        "95% quantile of active per MLP",
        "",
        "lower",
        "95% quantile over tokens of the same",
        "METRICS 2",
        _quantile("l0_p95"),
        blind=AS_SPARSE,
    ),
]
