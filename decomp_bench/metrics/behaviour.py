"""What the replacement does to the model's output."""

from __future__ import annotations

import numpy as np

from decomp_bench.metrics.base import Context, Metric, Sums, Values, parts, per_part, ratio

SMALLEST_EFFECT = 0.05
"""Nats. Where an ablation costs less, a recovered share is unstable and not given."""


def _ce(sums: Sums, _context: Context) -> Values:
    return per_part(sums, lambda part: ratio(sums["ce", part], sums["targets", "all"]), "ce")


def _ce_clean(sums: Sums, _context: Context) -> Values:
    return {("all", "all"): ratio(sums["ce_clean", "all"], sums["targets", "all"])} if ("ce_clean", "all") in sums else {}


def _ce_delta(sums: Sums, _context: Context) -> Values:
    return per_part(sums, lambda part: ratio(sums["ce", part] - sums["ce_clean", "all"], sums["targets", "all"]), "ce")


def _kl(sums: Sums, _context: Context) -> Values:
    return per_part(sums, lambda part: ratio(sums["kl", part], sums["targets", "all"]), "kl")


def _agreement(sums: Sums, _context: Context) -> Values:
    return per_part(sums, lambda part: ratio(sums["agreement", part], sums["targets", "all"]), "agreement")


def _recovered(base: str):
    def compute(sums: Sums, _context: Context) -> Values:
        layers = [part for part in parts(sums, "ce") if ("ce_" + base, part) in sums]
        values = {(part, "all"): _share(sums, base, [part]) for part in layers}
        if layers and "all" not in layers:  # protocol single: one share of the summed effects, since a single layer's may be too small
            values["all", "all"] = _share(sums, base, layers)
        return values

    return compute


def _share(sums: Sums, base: str, layers: list[str]) -> np.ndarray:
    gap = sum(sums[f"ce_{base}", part] - sums["ce_clean", "all"] for part in layers)
    regained = sum(sums[f"ce_{base}", part] - sums["ce", part] for part in layers)
    small = ratio(gap, sums["targets", "all"])[0] / len(layers) < SMALLEST_EFFECT  # type: ignore[arg-type]
    return np.full_like(gap, np.nan) if small else ratio(regained, gap)  # type: ignore[arg-type]


def _base(base: str):
    def compute(sums: Sums, _context: Context) -> Values:
        return per_part(sums, lambda part: ratio(sums[f"ce_{base}", part], sums["targets", "all"]), f"ce_{base}")

    return compute


def _output_mse(sums: Sums, _context: Context) -> Values:
    return per_part(sums, lambda part: ratio(sums["output_error", part], sums["tokens", "all"]), "output_error")


_NEEDS = f"not given where the ablation costs less than {SMALLEST_EFFECT} nats"
METRICS = [
    Metric(
        "ce_delta",
        "Cross-entropy increase",
        "nats/token",
        "lower",
        "CE(replaced) - CE(clean) over the scored next tokens",
        "METRICS 1.2",
        _ce_delta,
        task="lm",
        control="nothing replaced gives 0; zero and mean ablation bound it",
        blind="a target that knows nothing and has nothing to lose (experiment 024): read it beside ce_clean",
    ),
    Metric(
        "kl",
        "KL from clean",
        "nats/token",
        "lower",
        "mean_t KL(clean || replaced), log-softmax in fp32",
        "METRICS 1.2",
        _kl,
        task="lm",
        control="nothing replaced gives 0",
    ),
    Metric(
        "agreement",
        "Top-1 agreement",
        "",
        "higher",
        "share of tokens whose most likely next token is the clean model's",
        "METRICS 1.2",
        _agreement,
        task="lm",
        control="nothing replaced gives 1",
    ),
    Metric("ce", "Cross-entropy", "nats/token", "lower", "CE of the replaced model", "METRICS 1.3", _ce, task="lm"),
    Metric(
        "ce_clean", "Clean cross-entropy", "nats/token", "none", "CE of the target on the same tokens", "METRICS 1.3", _ce_clean, task="lm"
    ),
    Metric(
        "ce_mean",
        "Mean-ablated cross-entropy",
        "nats/token",
        "none",
        "CE with the MLPs' outputs at their training mean",
        "METRICS 1.3",
        _base("mean"),
        task="lm",
    ),
    Metric(
        "ce_zero",
        "Zero-ablated cross-entropy",
        "nats/token",
        "none",
        "CE with the MLPs' outputs at zero",
        "METRICS 1.3",
        _base("zero"),
        task="lm",
    ),
    Metric(
        "ce_recovered_mean",
        "CE recovered against mean ablation",
        "",
        "higher",
        "(CE_mean - CE) / (CE_mean - CE_clean)",
        "METRICS 1.3",
        _recovered("mean"),
        task="lm",
        needs=_NEEDS,
        control="mean ablation gives 0, nothing replaced 1",
    ),
    Metric(
        "ce_recovered_zero",
        "CE recovered against zero ablation",
        "",
        "higher",
        "(CE_zero - CE) / (CE_zero - CE_clean)",
        "METRICS 1.3",
        _recovered("zero"),
        task="lm",
        needs=_NEEDS,
        control="zero ablation gives 0, nothing replaced 1",
        blind="a target that knows nothing and has nothing to lose (experiment 024): read it beside ce_clean",
    ),
    Metric(
        "output_mse",
        "Output squared error",
        "",
        "lower",
        "mean over rows of mean over outputs of (clean - replaced)^2",
        "SPD (toys)",
        _output_mse,
        task="regression",
        control="nothing replaced gives 0",
    ),
]
