"""Statistics of a target's MLP outputs on the training split: what FVU and mean ablation refer to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from decomp_bench.checkpoint import write_tensors
from decomp_bench.config import digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.sources import Source
from decomp_bench.data.streams import order, positions, with_clean

POSITIONS = 65_536
LARGEST = 0.999
"""Outputs with norms above this quantile are left out of trimmed measures."""


@dataclass(frozen=True)
class OutputStatistics:
    """Mean output [d] of each layer's MLP, and the norm that 99.9% of its outputs stay under."""

    mean: dict[int, Tensor]
    largest: dict[int, Tensor]

    def to(self, device: torch.device) -> OutputStatistics:
        """The statistics on another device."""
        return OutputStatistics({k: v.to(device) for k, v in self.mean.items()}, {k: v.to(device) for k, v in self.largest.items()})


def output_statistics(source: Source) -> OutputStatistics:
    """Measured once per target and data on the first 65,536 training positions in the order of seed 0, then kept in the cache."""
    target = source.target
    file = cache_dir() / "statistics" / f"{digest([target.identity, source.hash, POSITIONS, 1], 20)}.safetensors"
    try:
        kept = load_file(file)
    except Exception:  # absent or broken: measured again
        kept = _measure(source)
        write_tensors(kept, file)
    layers = range(target.layers)
    found = OutputStatistics({layer: kept[f"mean/{layer}"] for layer in layers}, {layer: kept[f"largest/{layer}"] for layer in layers})
    return found.to(target.device)


@torch.no_grad()
def _measure(source: Source) -> dict[str, Tensor]:
    target = source.target
    points = {f"{layer}.mlp.out" for layer in range(target.layers)}
    index, step, seen = order(source.size("train"), 0, 0), 16 if target.is_lm else 1024, 0
    gathered: dict[str, list[Tensor]] = {point: [] for point in points}
    for start in range(0, len(index), step):
        batch = with_clean(source, source.batch("train", index[start : start + step]), points, logits=False)
        kept = positions(batch, target.keeps_first)
        for point in points:
            gathered[point].append(batch.clean[point][kept].double().cpu())
        seen += int(kept.sum())
        if seen >= POSITIONS:
            break
    statistics = {}
    for layer in range(target.layers):
        outputs = torch.cat(gathered[f"{layer}.mlp.out"])
        norms = outputs.norm(dim=1).sort().values
        statistics |= {f"mean/{layer}": outputs.mean(0).float(), f"largest/{layer}": norms[int(LARGEST * (len(norms) - 1))].float()}
    return statistics
