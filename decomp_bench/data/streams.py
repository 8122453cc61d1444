"""Endless training batches as pure functions of the step: resuming needs no stream state, and any group of runs sees the same data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from decomp_bench.checkpoint import write_tensors
from decomp_bench.config import digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Batch

BLOCK_POSITIONS = 32_768
"""Positions in a block: activation rows are shuffled within a block, sequences over the whole split."""
SCALE = ".scale"
"""After a point's name: the scales of its rows, where they are kept in int8."""
BUDGET_VARIABLE = "DECOMP_BENCH_CACHE_GB"


def order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which a split's rows are seen in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def tell_repeats(source: Source, split: str, epoch: int) -> None:
    """Warn, once, where a run goes over a text a second time: more tokens were asked for than there are."""
    if epoch == 1 and source.target.is_lm:
        tokens = int((source.rows(split).length - 1).sum())
        text = f"{source.name}: the {split} split has {tokens:,} tokens, fewer than are asked for; they are seen again in another order"
        warnings.warn(text, stacklevel=2)


class SequenceStream:
    """Batch `i` of whole rows with the target's clean activations and output."""

    def __init__(self, source: Source, points: set[str], rows: int, split: str = "train") -> None:
        self.source, self.points, self.split, self.rows = source, points, split, rows
        self.per_epoch = max(1, source.size(split) // rows)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def batch(self, i: int) -> Batch:
        """Batch i, on the target's device; tokens a batch: the sum of its rows' lengths."""
        epoch, place = divmod(i, self.per_epoch)
        if self._order[0] != epoch:
            tell_repeats(self.source, self.split, epoch)
            self._order = (epoch, order(self.source.size(self.split), self.source.config.seed, epoch))
        batch = self.source.batch(self.split, self._order[1][place * self.rows : (place + 1) * self.rows])
        return with_clean(self.source, batch, self.points)


def with_clean(source: Source, batch: Batch, points: set[str], logits: bool = True) -> Batch:
    """The batch on the target's device with clean activations and output filled in."""
    batch = batch.to(source.target.device)
    assert batch.x is not None
    batch.clean, batch.logits = source.target.clean(batch.x, points, logits)
    return batch


def positions(batch: Batch, keeps_first: bool) -> Tensor:
    """Which positions [B, T] (or rows [B]) are real and not a kept first one."""
    assert batch.x is not None
    if batch.length is None:
        return torch.ones(batch.x.shape[0], dtype=torch.bool, device=batch.x.device)
    place = torch.arange(batch.x.shape[1], device=batch.x.device)
    return (place[None] < batch.length[:, None]) & (place >= int(keeps_first))[None]


class ActivationStream:
    """Batch `i` of activation rows at some points, shuffled: rows are rounded to bf16 or int8 whether cached or computed live."""

    def __init__(self, source: Source, points: set[str], rows: int, split: str = "train") -> None:
        self.source, self.points, self.split, self.rows = source, frozenset(points), split, rows
        self.sequences = max(1, BLOCK_POSITIONS // source.context)
        self._blocks: list[int] = [0]  # number of batches before each block
        self._current: tuple[int, dict[str, Tensor]] = (-1, {})

    def batch(self, i: int) -> Batch:
        """Batch i on the target's device; `clean` holds [rows, d] for each point."""
        while self._blocks[-1] <= i:
            self._blocks.append(self._blocks[-1] + self._batches_in(len(self._blocks) - 1))
        block = int(np.searchsorted(self._blocks, i, side="right")) - 1
        if self._current[0] != block:
            self._current = (block, self._load(block))
        start = (i - self._blocks[block]) * self.rows
        rows = {name: value[start : start + self.rows] for name, value in self._current[1].items()}
        device = self.source.target.device
        return Batch(clean={point: unpacked(rows, point, device) for point in sorted(self.points)})

    def _index(self, block: int) -> np.ndarray:
        size = self.source.size(self.split)
        a_epoch = max(1, size // self.sequences)
        epoch, place = divmod(block, a_epoch)
        start = place * self.sequences
        tell_repeats(self.source, self.split, epoch)
        return order(size, self.source.config.seed, epoch)[start : start + self.sequences]

    def _batches_in(self, block: int) -> int:
        index = self._index(block)
        kept = int(self.source.target.keeps_first)
        scored = int((self.source.rows(self.split).length[index] - kept).sum()) if self.source.target.is_lm else len(index)
        if scored < self.rows:
            from decomp_bench.errors import UserError

            raise UserError(f"{len(index)} rows have {scored} positions, fewer than method.batch={self.rows}: make one smaller")
        return scored // self.rows

    def _load(self, block: int) -> dict[str, Tensor]:
        file = self._file(block)
        try:
            rows = load_file(file)
        except Exception:  # absent, or broken by hand: harvested again
            rows = self._harvest(block)
            if used_bytes() + sum(v.nbytes for v in rows.values()) <= budget_bytes():
                write_tensors(rows, file)
        shuffled = torch.randperm(
            len(next(iter(rows.values()))), generator=torch.Generator().manual_seed(block * 1000003 + self.source.config.seed)
        )
        return {point: value[shuffled] for point, value in rows.items()}

    def _file(self, block: int) -> Path:
        about = [self.source.target.identity, self.source.hash, self.split, sorted(self.points), self.source.config.seed, self.sequences]
        kept = self.source.config.activations
        key = digest(about if kept == "bf16" else [*about, kept], 20)
        return activation_folder() / key / f"{block}.safetensors"

    @torch.no_grad()
    def _harvest(self, block: int) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {point: [] for point in sorted(self.points)}
        index = self._index(block)
        for start in range(0, len(index), 16 if self.source.target.is_lm else len(index)):
            chosen = index[start : start + 16] if self.source.target.is_lm else index
            batch = with_clean(self.source, self.source.batch(self.split, chosen), set(self.points), logits=False)
            kept = positions(batch, self.source.target.keeps_first)
            for point, value in batch.clean.items():
                parts[point].append(value[kept].to("cpu", torch.bfloat16))
        rows = {point: torch.cat(values) for point, values in parts.items()}
        return rows if self.source.config.activations == "bf16" else as_int8(rows)


def as_int8(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows [n, d] of each point as int8, with each row's scale [n] beside them: its largest entry becomes 127."""
    packed = {}
    for point, value in rows.items():
        scale = value.float().abs().amax(1).clamp(min=1e-30) / 127
        packed |= {point: (value.float() / scale[:, None]).round().to(torch.int8), f"{point}{SCALE}": scale}
    return packed


def unpacked(rows: dict[str, Tensor], point: str, device: torch.device) -> Tensor:
    """A point's rows in fp32 on a device."""
    value = rows[point].to(device).float()
    return value * rows[f"{point}{SCALE}"].to(device)[:, None] if f"{point}{SCALE}" in rows else value


def iterate(stream: SequenceStream | ActivationStream, start: int = 0) -> Iterator[Batch]:
    """The stream's batches from a step on, without end."""
    while True:
        yield stream.batch(start)
        start += 1


def activation_folder() -> Path:
    """Where harvested activations are kept."""
    return cache_dir() / "activations"


def used_bytes() -> int:
    """Bytes of harvested activations on disk."""
    folder = activation_folder()
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) if folder.is_dir() else 0


def budget_bytes() -> int:
    """Byte budget of harvested activations (DECOMP_BENCH_CACHE_GB, default 8): beyond it they are computed live."""
    return int(float(os.environ.get(BUDGET_VARIABLE, "8")) * 1e9)
