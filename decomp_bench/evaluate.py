"""Runs the metric catalogue over decomposers: every method, every protocol, both gate sources, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from decomp_bench.ablation import Arrays, ablations
from decomp_bench.bootstrap import documents_frame, evaluate_sums, resampled
from decomp_bench.config import EvalConfig
from decomp_bench.data.sources import Source
from decomp_bench.data.statistics import OutputStatistics, output_statistics
from decomp_bench.data.streams import with_clean
from decomp_bench.decomposer import Choice, Codes, Decomposer, Protocol, Site, layer_of
from decomp_bench.metrics import CATALOGUE, HEADLINE, UNINTERVALLED, Context, SiteInfo, metric_catalogue, metric_versions
from decomp_bench.metrics.liveness import DENSE
from decomp_bench.metrics.observe import Liveness, RowSums, Scored, base_sums, behaviour_sums, code_sums, output_sums
from decomp_bench.quantise import coefficient_bits
from decomp_bench.replacement import clean_codes, clean_points, replaced, unit_of

__all__ = ["Condition", "Evaluation", "evaluate", "metric_catalogue", "metric_versions"]

GLOBAL_GATE = "a gate reads layers after its site, which the replaced stream has not reached"


TRAINED = Choice()
"""No choice at inference: the sparsity that the run was trained at."""


@dataclass(frozen=True)
class Condition:
    """What a row was measured under."""

    protocol: Protocol
    gates: str
    choice: Choice = TRAINED

    @property
    def curve(self) -> str:
        return "inference" if self.choice != TRAINED else "trained"


@dataclass
class Evaluation:
    """A decomposer's rows of the results schema, the per-document sums behind them, and the convergence verdict."""

    rows: list[dict[str, Any]]
    documents: pd.DataFrame
    converged: str


@dataclass
class _Measured:
    """Sums of one condition while batches come in."""

    decomposer: Decomposer
    condition: Condition
    documents: int
    bases: Arrays
    sums: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    liveness: Liveness = field(default_factory=Liveness)

    def add(self, rows: RowSums, doc: torch.Tensor) -> None:
        """Add row sums to their documents."""
        for key, value in rows.items():
            if key not in self.sums:
                self.sums[key] = torch.zeros(self.documents, dtype=torch.float64, device=value.device)
            self.sums[key].index_add_(0, doc, value.double())

    def arrays(self) -> Arrays:
        """Quantity -> [documents]; ablations together go with protocols that replace all layers, one by one with `single`."""
        together = self.condition.protocol != "single"
        wanted = {key: value for key, value in self.bases.items() if (key[1] == "all") == together}
        return {key: value.cpu().numpy() for key, value in self.sums.items()} | wanted


def conditions(decomposer: Decomposer, config: EvalConfig) -> list[Condition]:
    """What is measured of a decomposer: every protocol and gate source, then its inference-time sweep.

    A method that nothing was trained for is swept under every protocol, since its sweep is its curve.
    """
    main = [
        Condition(protocol, gates)
        for protocol in config.protocols
        for gates in config.gates
        if gates == "self" or not _same(decomposer, protocol)
    ]
    swept = config.sweep_protocols if decomposer.trainable else config.protocols
    gates = config.sweep_gates if decomposer.trainable else config.gates
    choices = decomposer.sweep() if config.sweep or not decomposer.trainable else []
    sweep = [Condition(p, g, choice) for choice in choices for p in swept for g in gates if g == "self" or not _same(decomposer, p)]
    return [c for c in main + sweep if c.gates != "self" or _upstream(decomposer)]


def _same(decomposer: Decomposer, protocol: Protocol) -> bool:
    """Whether clean and self gates are the same by construction: clean unit inputs, and gates computed from nothing else."""
    return protocol != "cascading" and all(
        p.endswith((".mlp.in", ".mlp.out", ".attn.in")) for site in decomposer.sites for p in site.gates_from
    )


def _upstream(decomposer: Decomposer) -> bool:
    return all(layer_of(point) <= site.layer for site in decomposer.sites for point in site.gates_from)


@torch.no_grad()
def evaluate(
    decomposers: list[Decomposer],
    source: Source,
    config: EvalConfig,
    snapshots: list[Decomposer | None] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[Evaluation]:
    """Score decomposers of one target on the same rows; the clean pass is shared. fp32 throughout, weights untouched.

    `snapshots` are the decomposers at two thirds of their training, for the convergence verdict.
    """
    target, rows = source.target, source.evaluation_rows(config.split, config.tokens)
    for decomposer in [*decomposers, *(s for s in snapshots or [] if s is not None)]:
        decomposer.to(target.device).eval()
    statistics = output_statistics(source)
    plans, early = _plan(decomposers, snapshots or [None] * len(decomposers), source, config, rows, statistics)
    bits = _coefficient_bits(decomposers, source, config)
    points = set().union(*(clean_points(d, d.layers) for d in decomposers)) if decomposers else set()
    batches = list(range(0, rows, config.batch))
    for number, start in enumerate(batches):
        batch = with_clean(source, source.batch(config.split, np.arange(start, min(rows, start + config.batch))), points)
        scored = Scored.of(batch, target.is_lm)
        for decomposer, plan, snapshot in zip(decomposers, plans, early, strict=True):
            _measure(decomposer, [*plan, *([snapshot] if snapshot else [])], scored, statistics)
        if progress:
            progress({"batch": number + 1, "batches": len(batches)})
    token_hash = source.token_hash(config.split, rows)
    return [
        _report(d, plan, snapshot, b, source, config, token_hash)
        for d, plan, snapshot, b in zip(decomposers, plans, early, bits, strict=True)
    ]


def _plan(
    decomposers: list[Decomposer],
    snapshots: list[Decomposer | None],
    source: Source,
    config: EvalConfig,
    rows: int,
    statistics: OutputStatistics,
) -> tuple[list[list[_Measured]], list[_Measured | None]]:
    """What is to be measured of each decomposer, and of its snapshot under the headline condition."""
    documents = int(source.batch(config.split, np.array([rows - 1])).doc.max()) + 1  # type: ignore[union-attr]
    bases = {layers: ablations(source, config, rows, layers, statistics) for layers in {d.layers for d in decomposers}}
    plans = [[_Measured(d, c, documents, bases[d.layers]) for c in conditions(d, config)] for d in decomposers]
    headline = Condition("cascading", "clean")
    early = [
        None if snapshot is None or not d.trainable else _Measured(snapshot, headline, documents, bases[d.layers])
        for d, snapshot in zip(decomposers, snapshots, strict=True)
    ]
    return plans, early


def _measure(decomposer: Decomposer, plan: list[_Measured], scored: Scored, statistics: OutputStatistics) -> None:
    """Every condition of a decomposer on one batch."""
    base = base_sums(scored)
    codes: dict[tuple[int, Choice], Codes] = {}
    for measured in plan:
        condition, who = measured.condition, measured.decomposer
        view = who if condition.choice == TRAINED else who.at(**vars(condition.choice))
        given: Codes | str = "self"
        if condition.gates == "clean":
            key = (id(who), condition.choice)
            given = codes[key] if key in codes else codes.setdefault(key, clean_codes(view, scored.batch))
        doc = scored.batch.doc
        assert doc is not None
        measured.add(base, doc)
        layers = [view.layers] if condition.protocol != "single" else [(layer,) for layer in view.layers]
        for chosen in layers:
            out = replaced(view, scored.batch, chosen, condition.protocol, given)  # type: ignore[arg-type]
            part = "all" if condition.protocol != "single" else str(chosen[0])
            sites = [s for s in view.sites if s.name in out.codes and (part == "all" or s.layer == chosen[0])]
            measured.add(behaviour_sums(scored, out.logits, part), doc)
            measured.add(output_sums(scored, out, statistics, int(view.target.keeps_first)), doc)
            measured.add(code_sums(scored, out, view, sites), doc)
            measured.liveness.add(scored, out, view, sites)


def _coefficient_bits(decomposers: list[Decomposer], source: Source, config: EvalConfig) -> list[float]:
    """Bits that a coefficient of each decomposer needs, measured on the first rows of the split."""
    size = source.evaluation_rows(config.split, min(config.tokens, 2048))
    found = []
    for decomposer in decomposers:
        batch = with_clean(source, source.batch(config.split, np.arange(size)), clean_points(decomposer))
        found.append(coefficient_bits(decomposer, Scored.of(batch, source.target.is_lm)))
    return found


# ---- from sums to rows


def context(decomposer: Decomposer, condition: Condition, alive: dict[str, int], bits: float) -> Context:
    """What the accounting needs to know of a decomposer under a condition."""
    view = decomposer if condition.choice == TRAINED else decomposer.at(**vars(condition.choice))
    writes = {slot.write for site in view.sites for slot in site.slots if ".mlp." in slot.write}
    return Context(
        view.layers,
        tuple(_site_info(site) for site in view.sites),
        view.target.task,
        condition.protocol,
        float(sum(view.constant_size(w) for w in writes)),
        float(sum(view.constant_coefficients(w) for w in writes)),
        bits,
        alive,
    )


def _site_info(site: Site) -> SiteInfo:
    units = {unit_of(slot.write) for slot in site.slots}
    return SiteInfo(site.name, site.layer, next(iter(units)).split(".")[1], site.n, len(units))


def _report(
    decomposer: Decomposer,
    plan: list[_Measured],
    snapshot: _Measured | None,
    bits: float,
    source: Source,
    config: EvalConfig,
    token_hash: str,
) -> Evaluation:
    rows, frames, seed = [], [], config.bootstrap
    common = _describe(decomposer, source, config, token_hash)
    weights = resampled(plan[0].documents, seed) if plan else np.ones((1, 1))
    for measured in plan:
        live = measured.liveness.sums(1 if measured.condition.protocol == "single" else len(decomposer.layers), DENSE)
        alive = {name: int(value) for (quantity, name), value in live.items() if quantity == "fired"}
        ctx = context(decomposer, measured.condition, alive, bits)
        arrays = measured.arrays()
        for gates in _labels(decomposer, measured.condition, config):
            about = common | _condition_columns(decomposer, replace(measured.condition, gates=gates))
            rows += _rows(arrays, live, ctx, weights, about)
            frames.append(documents_frame(arrays, ctx, about))
    if not _upstream(decomposer):
        rows += [
            common | _condition_columns(decomposer, Condition(p, "self")) | _not_applicable(key)
            for p in config.protocols
            for key in CATALOGUE
        ]
    return Evaluation(
        rows, pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(), _verdict(decomposer, plan, snapshot, weights)
    )


def _labels(decomposer: Decomposer, condition: Condition, config: EvalConfig) -> Iterator[str]:
    """The gate sources that a measurement stands for: both where they are the same by construction."""
    if _same(decomposer, condition.protocol):
        yield from config.gates
    else:
        yield condition.gates


def _describe(decomposer: Decomposer, source: Source, config: EvalConfig, token_hash: str) -> dict[str, Any]:
    return {
        "method": decomposer.name,
        "kind": decomposer.kind,
        "trainable": decomposer.trainable,
        "family": decomposer.family,
        "target": source.target.uri,
        "target_hash": source.target.identity,
        "dataset": source.name,
        "token_hash": token_hash,
        "split": config.split,
        "layers": ",".join(map(str, decomposer.layers)),
        "init": decomposer.init,
        "positions": "1:" if source.target.keeps_first else "all",
    }


def _condition_columns(decomposer: Decomposer, condition: Condition) -> dict[str, Any]:
    variant = ", ".join(filter(None, (decomposer.variant if decomposer.trainable else "", condition.choice.label))) or decomposer.variant
    return {
        "protocol": condition.protocol,
        "gates": condition.gates,
        "curve": condition.curve,
        "variant": variant,
        "mask": condition.choice.mask or "binary",
        "delta": "on" if condition.choice.delta else "off",
    }


def _rows(arrays: dict, live: dict, ctx: Context, weights: np.ndarray, about: dict[str, Any]) -> list[dict[str, Any]]:
    tokens = int(arrays["tokens", "all"].sum())
    sums = {key: weights @ value for key, value in arrays.items()}
    counts = {key: np.array([value]) for key, value in live.items()}
    rows = []
    for metric in CATALOGUE.values():
        if metric.task not in ("both", ctx.task):
            continue
        values = evaluate_sums(metric, counts if metric.key in UNINTERVALLED else sums, ctx)
        for (layer, site), value in values.items():
            rows.append(about | _row(metric.key, value) | {"layer": layer, "site": site, "n": tokens})
    return rows


def _row(key: str, value: np.ndarray) -> dict[str, Any]:
    """Point estimate and 95% percentile interval; NaN is not applicable, with the metric's reason."""
    metric, point = CATALOGUE[key], float(value[0])
    spread = np.nanquantile(value[1:], [0.025, 0.975]) if len(value) > 1 and np.isfinite(value[1:]).any() else (math.nan, math.nan)
    missing = not math.isfinite(point)
    return {
        "metric": key,
        "metric_version": metric.version,
        "value": point,
        "lo": float(spread[0]),
        "hi": float(spread[1]),
        "applicable": "no" if missing else "yes",
        "reason": (metric.needs or "not finite") if missing else "",
        "base": key.rsplit("_", 1)[1] if key.startswith("ce_recovered") else "",
    }


def _not_applicable(key: str) -> dict[str, Any]:
    return {
        "metric": key,
        "metric_version": CATALOGUE[key].version,
        "value": math.nan,
        "applicable": "no",
        "reason": GLOBAL_GATE,
        "layer": "all",
        "site": "all",
    }


def _verdict(decomposer: Decomposer, plan: list[_Measured], snapshot: _Measured | None, weights: np.ndarray) -> str:
    """Did the last third of training move the headline metric by more than half its 95% interval?"""
    final = next((m for m in plan if snapshot and m.condition == snapshot.condition), None)
    if final is None or snapshot is None:
        return "unknown" if decomposer.trainable else "yes"
    metric = CATALOGUE[HEADLINE[decomposer.target.task]]
    ctx = context(decomposer, final.condition, {}, math.nan)
    now, before = (evaluate_sums(metric, {k: weights @ v for k, v in m.arrays().items()}, ctx)["all", "all"] for m in (final, snapshot))
    half = float(np.diff(np.nanquantile(now[1:], [0.025, 0.975]))[0]) / 2
    return "no" if abs(now[0] - before[0]) > half else "yes"
