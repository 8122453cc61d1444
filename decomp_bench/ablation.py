"""Zero- and mean-ablated cross-entropy of a target: what recovered shares refer to. Measured once per target, tokens and layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from decomp_bench.config import EvalConfig, digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.sources import Source
from decomp_bench.data.statistics import OutputStatistics
from decomp_bench.data.streams import with_clean
from decomp_bench.files import atomically
from decomp_bench.metrics.observe import Scored, ablation_sums

Arrays = dict[tuple[str, str], np.ndarray]
"""(ce_mean or ce_zero, layer or all) -> [documents]."""


def ablations(source: Source, config: EvalConfig, rows: int, layers: tuple[int, ...], statistics: OutputStatistics) -> Arrays:
    """Per-document cross-entropy sums with the layers' MLP outputs at their training mean and at zero, together and one by one."""
    if not source.target.is_lm:
        return {}
    key = digest([source.target.identity, source.hash, source.token_hash(config.split, rows), layers, 1], 20)
    file = cache_dir() / "ablations" / f"{key}.npz"
    try:
        kept = np.load(file, allow_pickle=False)
        return {(name.split("@")[0], name.split("@")[1]): kept[name] for name in kept.files}
    except (OSError, ValueError, IndexError):
        sums = _measure(source, config, rows, layers, statistics)

    def save(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **{"@".join(key): value for key, value in sums.items()})

    atomically(file, save)
    return sums


@torch.no_grad()
def _measure(source: Source, config: EvalConfig, rows: int, layers: tuple[int, ...], statistics: OutputStatistics) -> Arrays:
    documents = source.documents_in(config.split, rows)
    sums: dict[tuple[str, str], torch.Tensor] = {}
    zero = {layer: torch.zeros_like(mean) for layer, mean in statistics.mean.items()}
    parts = {"all": layers} | {str(layer): (layer,) for layer in layers}
    resid = {f"{layer}.resid" for layer in layers if layer}
    for start in range(0, rows, config.batch):
        batch = with_clean(source, source.batch(config.split, np.arange(start, min(rows, start + config.batch))), resid)
        scored = Scored.of(batch, True)
        for part, chosen in parts.items():
            for name, constants in (("ce_mean", statistics.mean), ("ce_zero", zero)):
                found = ablation_sums(scored, source.target, {layer: constants[layer] for layer in chosen}, name, part)
                for key, value in found.items():
                    total = sums.setdefault(key, torch.zeros(documents, dtype=torch.float64, device=value.device))
                    total.index_add_(0, batch.doc, value)  # type: ignore[arg-type]
    return {key: value.cpu().numpy() for key, value in sums.items()}
