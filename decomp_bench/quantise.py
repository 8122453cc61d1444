"""How many bits a coefficient carries: the fewest at which quantised coefficients leave the output as it was."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import torch

from decomp_bench.decomposer import Decomposer, Edit, Site, SiteCodes
from decomp_bench.metrics.observe import Scored, behaviour_sums
from decomp_bench.replacement import clean_codes, replaced

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24)
TOLERANCE = 1e-3
"""Nats of cross-entropy; for a toy, the share of its output error."""


def quantiser(largest: dict[str, torch.Tensor], bits: int) -> Edit:
    """An edit that rounds each component's gated strength to one of 2^bits levels, evenly spaced up to its largest magnitude."""
    levels = 2 ** (bits - 1)

    def edit(site: Site, codes: SiteCodes) -> SiteCodes:
        step = largest[site.name] / levels
        rounded = (codes.strength / step).round().clamp(-levels, levels) * step
        return replace(codes, strength=torch.where(step > 0, rounded, codes.strength))

    return edit


@torch.no_grad()
def coefficient_bits(decomposer: Decomposer, scored: Scored) -> float:
    """The fewest bits at which the mean cross-entropy (a toy: its output error) changes by less than the tolerance, all layers cascading.

    A sign is one of the bits. NaN where even 24 bits change the output, which a finite replacement never does.
    """
    codes = clean_codes(decomposer, scored.batch)
    kept = scored.kept[..., None]  # what stands at padding must not set the scale
    largest = {name: (c.strength.abs() * (c.active & kept)).flatten(0, -2).amax(0) for name, c in codes.items()}
    exact = _score(decomposer, scored, codes, None)
    tolerance = TOLERANCE if scored.clean_logp is not None else 10 * TOLERANCE * abs(exact)

    def enough(bits: int) -> bool:
        return abs(_score(decomposer, scored, codes, quantiser(largest, bits)) - exact) < tolerance

    first = bisect_left(BITS, True, key=enough)  # more bits never hurt, up to rounding
    return float(BITS[first]) if first < len(BITS) else float("nan")


def _score(decomposer: Decomposer, scored: Scored, codes: dict[str, SiteCodes], edit: Edit | None) -> float:
    out = replaced(decomposer, scored.batch, decomposer.layers, "cascading", codes, edit)
    sums = behaviour_sums(scored, out.logits, "all")
    if scored.next_kept is None:
        return float(sums["output_error", "all"].mean())
    return float(sums["ce", "all"].sum() / scored.next_kept.sum())
