"""Runs the metric catalogue over decomposers: every method, every protocol, both gate sources, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from decomp_bench.ablation import Arrays, ablations
from decomp_bench.bootstrap import documents_frame, evaluate_sums, resampled
from decomp_bench.conditions import Condition, columns, conditions, gate_labels, upstream, view_of
from decomp_bench.config import EvalConfig
from decomp_bench.data.sources import Source
from decomp_bench.data.statistics import OutputStatistics, output_statistics
from decomp_bench.data.streams import with_clean
from decomp_bench.decomposer import Choice, Codes, Decomposer
from decomp_bench.metrics import CATALOGUE, HEADLINE, metric_catalogue, metric_versions
from decomp_bench.metrics.liveness import DENSE
from decomp_bench.metrics.observe import Liveness, RowSums, Scored, activity, base_sums, behaviour_sums, code_sums, output_sums
from decomp_bench.quantise import coefficient_bits
from decomp_bench.recovery import recovered
from decomp_bench.replacement import clean_codes, clean_points, replaced
from decomp_bench.rows import context, describe, not_applicable, rows_of

__all__ = ["Evaluation", "evaluate", "metric_catalogue", "metric_versions"]


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
    size = config.batch * source.rows_a_sequence
    batches = list(range(0, rows, size))
    for number, start in enumerate(batches):
        batch = with_clean(source, source.batch(config.split, np.arange(start, min(rows, start + size))), points)
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
    documents = source.documents_in(config.split, rows)
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
        view = view_of(who, condition)
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
            found = activity(scored, out, view, sites)
            measured.add(code_sums(found), doc)
            measured.liveness.add(scored, found, view, sites)


def _coefficient_bits(decomposers: list[Decomposer], source: Source, config: EvalConfig) -> list[float]:
    """Bits that a coefficient of each decomposer needs, measured on the first rows of the split."""
    size = source.evaluation_rows(config.split, min(config.tokens, 2048))
    found = []
    for decomposer in decomposers:
        batch = with_clean(source, source.batch(config.split, np.arange(size)), clean_points(decomposer))
        found.append(coefficient_bits(decomposer, Scored.of(batch, source.target.is_lm)))
    return found


def _report(
    decomposer: Decomposer,
    plan: list[_Measured],
    snapshot: _Measured | None,
    bits: float,
    source: Source,
    config: EvalConfig,
    token_hash: str,
) -> Evaluation:
    """A decomposer's sums as rows, documents and verdict."""
    rows, frames = [], []
    common = describe(decomposer, source, config, token_hash)
    scored = plan[0].arrays()["tokens", "all"] > 0  # a prefix of the rows may leave documents out
    weights = np.zeros((1 + config.bootstrap, len(scored)))
    weights[:, scored] = resampled(int(scored.sum()), config.bootstrap)
    for measured in plan:
        live = measured.liveness.sums(1 if measured.condition.protocol == "single" else len(decomposer.layers), DENSE)
        alive = {name: int(value) for (quantity, name), value in live.items() if quantity == "fired"}
        if measured is plan[0]:
            live |= recovered(decomposer, measured.liveness.fired)
        ctx = context(decomposer, measured.condition, alive, bits)
        arrays = measured.arrays()
        for gates in gate_labels(decomposer, measured.condition, config):
            about = common | columns(decomposer, replace(measured.condition, gates=gates))
            rows += rows_of(arrays, live, ctx, weights, about)
            frames.append(documents_frame(arrays, ctx, about))
    if not upstream(decomposer):
        rows += not_applicable(decomposer, config, common)
    return Evaluation(rows, pd.concat(frames, ignore_index=True), _verdict(decomposer, plan, snapshot, weights))


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
