"""Where components fire: how often, and the stretches of held-out text where each fires most. Through the interface of every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from decomp_bench.data.sources import Source
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.replacement import clean_codes, clean_rows

BEFORE, AFTER = 14, 8
"""Positions that are shown on either side of a peak."""
BATCH = 16
"""Sequences that are encoded together."""


@dataclass
class Firing:
    """Of each of a site's components: at how many positions it is active, and the sum of its coefficient's size."""

    active: Int[Tensor, " n"]
    size: Float[Tensor, " n"]


@dataclass
class Peaks:
    """Of each of m components its largest coefficients by size, at most one in a row of text, largest first.

    `row` and `place` say where (-1: there is none), `window` holds the coefficients around it.
    """

    size: Float[Tensor, "m k"]
    row: Int[Tensor, "m k"]
    place: Int[Tensor, "m k"]
    window: Float[Tensor, "m k w"]


Batches = Iterable[tuple[int, Batch]]
"""Batches, each with the index of its first row."""


def batches(
    decomposer: Decomposer, source: Source, split: str, rows: int, progress: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[tuple[int, Batch]]:
    """The first rows of a split with the clean activations that the decomposition reads."""
    size = BATCH * source.rows_a_sequence
    for start in range(0, rows, size):
        if progress:
            progress({"phase": "looking at components", "batch": start // size + 1, "batches": -(-rows // size)})
        index = np.arange(start, min(rows, start + size))
        yield start, with_clean(source, source.batch(split, index), decomposer.points(), logits=False)


@torch.no_grad()
def firing(decomposer: Decomposer, given: Batches) -> tuple[int, dict[str, Firing]]:
    """The number of scored positions, and how often and how strongly each component of every site fires there."""
    found = {site.name: Firing(torch.zeros(site.n, dtype=torch.long), torch.zeros(site.n, dtype=torch.double)) for site in decomposer.sites}
    scored = 0
    for _, batch in given:
        kept = _kept(decomposer, batch)
        scored += int(kept.sum())
        for name, codes in clean_codes(decomposer, batch).items():
            found[name].active += codes.active[kept].sum(0).cpu()
            found[name].size += codes.value[kept].abs().sum(0).cpu()
    return scored, found


@torch.no_grad()
def strongest(decomposer: Decomposer, given: Batches, chosen: Mapping[str, Int[Tensor, " m"]], most: int) -> dict[str, Peaks]:
    """Where chosen components of each site have their largest coefficients."""
    found: dict[str, Peaks] = {}
    for start, batch in given:
        kept = _kept(decomposer, batch)[..., None]
        for name, codes in clean_codes(decomposer, batch).items():
            value = (codes.value[..., chosen[name].to(codes.value.device)] * kept).float().cpu()
            here = _peaks(value if decomposer.target.is_lm else value[:, None], start, most)
            found[name] = _merged(found[name], here, most) if name in found else here
    return found


def _kept(decomposer: Decomposer, batch: Batch) -> Tensor:
    """Which of the encoded positions are real."""
    return clean_rows(decomposer, positions(batch, decomposer.target.keeps_first))


def _peaks(value: Float[Tensor, "B T m"], start: int, most: int) -> Peaks:
    size, place = (part.T for part in value.abs().max(1))
    padded = torch.nn.functional.pad(value.permute(2, 0, 1), (BEFORE, AFTER))
    window = padded.gather(2, place[..., None] + torch.arange(BEFORE + 1 + AFTER))
    row = torch.arange(start, start + len(value)).expand(size.shape)
    return _largest(Peaks(size, torch.where(size > 0, row, -1), place, window), most)


def _largest(found: Peaks, most: int) -> Peaks:
    order = found.size.sort(dim=1, descending=True, stable=True).indices[:, :most]
    window = found.window.gather(1, order[..., None].expand(-1, -1, found.window.shape[2]))
    return Peaks(found.size.gather(1, order), found.row.gather(1, order), found.place.gather(1, order), window)


def _merged(first: Peaks, second: Peaks, most: int) -> Peaks:
    """The largest of both."""
    return _largest(Peaks(*(torch.cat([getattr(one, name) for one in (first, second)], 1) for name in vars(first))), most)
