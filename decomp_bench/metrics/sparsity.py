"""How much is active: no single count is fair, so four are reported. MLPs and attention are counted apart."""

from __future__ import annotations

import math

import numpy as np

from decomp_bench.metrics.base import AS_SPARSE, Context, Metric, SiteInfo, Sums, Values, ratio


def _mean_active(sums: Sums, site: SiteInfo) -> np.ndarray:
    return ratio(sums["active", site.name], sums["tokens", "all"])


def _l0_module(sums: Sums, context: Context) -> Values:
    each = {(str(site.layer), site.name): _mean_active(sums, site) for site in context.sites if ("active", site.name) in sums}
    mlp = [each[str(site.layer), site.name] for site in context.mlp_sites() if (str(site.layer), site.name) in each]
    return {**each, **({("all", "all"): np.mean(mlp, axis=0)} if mlp else {})}


def _per_mlp(sums: Sums, context: Context, weight) -> np.ndarray | None:
    sites = [site for site in context.mlp_sites() if ("active", site.name) in sums]
    return sum(weight(site) for site in sites) / len(context.layers) if sites else None  # type: ignore[return-value]


def _whole(value: np.ndarray | None) -> Values:
    return {} if value is None else {("all", "all"): value}


def _l0_mlp(sums: Sums, context: Context) -> Values:
    return _whole(_per_mlp(sums, context, lambda site: _mean_active(sums, site) * site.writes))


def _l0_node(sums: Sums, context: Context) -> Values:
    return _whole(_per_mlp(sums, context, lambda site: _mean_active(sums, site)))


def _l0_attention(sums: Sums, context: Context) -> Values:
    sites = [site for site in context.sites if site.unit == "attn" and ("active", site.name) in sums]
    return _whole(sum(_mean_active(sums, site) for site in sites) / len(context.layers)) if sites else {}  # type: ignore[arg-type]


def _active_params(sums: Sums, context: Context) -> Values:
    value = _per_mlp(sums, context, lambda site: ratio(sums["active_scalars", site.name], sums["tokens", "all"]))
    return _whole(None if value is None else value + context.constant_size / len(context.layers))


def _bits(sums: Sums, context: Context) -> Values:
    def weight(site: SiteInfo) -> np.ndarray:
        naming = math.log2(max(1, context.alive.get(site.name, site.n)))
        active, passed = (sums[quantity, site.name] for quantity in ("active", "active_coefficients"))
        return ratio(active * naming + passed * context.coefficient_bits, sums["tokens", "all"])

    value = _per_mlp(sums, context, weight)
    constant = context.constant_coefficients * context.coefficient_bits if context.constant_coefficients else 0.0
    return _whole(None if value is None else value + constant / len(context.layers))


METRICS = [
    Metric(
        "l0_mlp",
        "Active components per MLP",
        "",
        "lower",
        "sum over sites of mean active, times the layers that a site writes to, / MLPs; a parameter method sums an MLP's matrices",
        "DESIGN 4; Bussmann et al. (nn_decompositions), axis b",
        _l0_mlp,
        control="BatchTopK: within 5% of k",
        blind=AS_SPARSE,
    ),
    Metric(
        "l0_module",
        "Active components per module",
        "",
        "lower",
        "mean active of a site; `all`: mean over the MLPs' sites",
        "DESIGN 4",
        _l0_module,
        blind=AS_SPARSE,
    ),
    Metric(
        "l0_node",
        "Active components per MLP, each once",
        "",
        "lower",
        "sum over sites of mean active / MLPs",
        "METRICS 2",
        _l0_node,
        blind=AS_SPARSE,
    ),
    Metric(
        "l0_attention",
        "Active components per attention",
        "",
        "lower",
        "sum over attention sites of mean active / layers",
        "DESIGN 4",
        _l0_attention,
        needs="only where attention is decomposed",
        blind=AS_SPARSE,
    ),
    Metric(
        "active_params",
        "Active parameters per MLP",
        "scalars",
        "lower",
        "sum over active components of scalars in their read and write vectors, plus what is always on, / MLPs",
        "METRICS 2",
        _active_params,
        control="all gates zero leaves what is always on",
        blind=AS_SPARSE,
    ),
    Metric(
        "bits",
        "Description bits per MLP",
        "bits/token",
        "lower",
        "sum over active components of log2(alive in the site) + b for each coefficient (one, or as many as its rank), plus b for each "
        "always-on one, / MLPs; b: the fewest bits "
        "a coefficient at which the output changes by less than 0.001 nat (a toy: 1% of its error)",
        "METRICS 2; APD's description length",
        _bits,
        control="one more component costs at least log2 of the pool",
        blind=AS_SPARSE,
        version=1,
    ),
]
