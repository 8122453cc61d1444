"""The tails of activations: how much of what components contribute lies beyond the largest few, and how much of a layer in few tokens.

Components of a token are ranked by |strength| |write vector|, whether their gates let them through or not, on clean activations. What lies
beyond a rank is what a choice of that many components gives up, and gates that let through what lies far out keep a tail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import PositiveInt
from torch import Tensor

from decomp_bench.bootstrap import resampled, spread
from decomp_bench.config import Config
from decomp_bench.data.sources import Source
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Decomposer
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.measurements._baselines import OF_TARGET
from decomp_bench.metrics.observe import write_norms
from decomp_bench.replacement import clean_codes, clean_points, clean_rows
from decomp_bench.results import condition

METRICS = (
    Measured(
        "tail_share",
        "Contributions beyond a rank",
        "",
        "lower",
        "sum of |strength| |write vector| beyond the r largest / the whole",
        "sparsity of junk",
    ),
    Measured(
        "tail_active",
        "Active components beyond a rank",
        "",
        "lower",
        "let through beyond the r largest / all let through",
        "sparsity of junk",
    ),
    Measured("token_share", "Squared norm in the largest tokens", "", "none", "sum of |x|^2 over the largest tokens / over all"),
)
ABOUT = {"protocol": "clean", "gates": "self"}


class TailsConfig(Config):
    """Where tails are cut."""

    ranks: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    shares: tuple[float, ...] = (0.001, 0.01, 0.1)
    """Of tokens."""
    split: Literal["validation", "test"] = "test"
    tokens: PositiveInt = 20_000
    batch: PositiveInt = 16
    """Sequences at a time."""
    bootstrap: PositiveInt = 2000


@dataclass
class _Tally:
    """Sums of each document: contributions and active components of each site, beyond each rank and whole."""

    documents: int
    ranks: tuple[int, ...]
    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def add(self, site: str, size: Float[Tensor, "N n"], active: Bool[Tensor, "N n"], doc: Int[Tensor, " N"]) -> None:
        """Take in the components of some tokens."""
        ranks = [rank for rank in self.ranks if rank < size.shape[1]]
        value, order = size.sort(-1, descending=True)
        for name, ordered in (("share", value), ("active", active.gather(-1, order).to(value.dtype))):
            whole = ordered.sum(-1, keepdim=True)
            beyond = (whole - ordered.cumsum(-1)[:, [rank - 1 for rank in ranks]]).clamp(min=0)
            sums = torch.cat([whole, beyond], -1)
            key = (name, site)
            self.sums.setdefault(key, torch.zeros(self.documents, sums.shape[1], dtype=sums.dtype)).index_add_(0, doc, sums.cpu())

    def ratios(self, name: str, site: str, weights: np.ndarray, seen: np.ndarray) -> Float[np.ndarray, "R ranks"]:
        """What lies beyond each rank as a share of the whole, for each resample of the documents."""
        sums = weights @ self.sums[name, site].numpy()[seen]
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[:, 1:] / sums[:, :1]


def measure(decomposer: Decomposer, source: Source, config: TailsConfig, progress: Progress) -> Rows:
    """Rows of each site and of the mean of sites, at ranks that have components beyond them; and of the target's MLP inputs and outputs."""
    rows, size = source.evaluation_rows(config.split, config.tokens), config.batch * source.rows_a_sequence
    tally = _Tally(source.documents_in(config.split, rows), config.ranks)
    norms: dict[tuple[int, str], list[Tensor]] = {}
    docs: list[Tensor] = []
    starts = range(0, rows, size)
    for number, start in enumerate(starts):
        docs.append(_add(decomposer, source, config, np.arange(start, min(rows, start + size)), tally, norms))
        progress(number + 1, len(starts))
    doc = torch.cat(docs).numpy()
    seen = np.unique(doc)
    weights = resampled(len(seen), config.bootstrap)
    found = [*_of_components(decomposer, tally, weights, seen), *_of_tokens(config, norms, doc, weights, seen)]
    about = {**ABOUT, "split": config.split, "token_hash": source.token_hash(config.split, rows)}
    return [{**about, "n": len(doc), **row} for row in found]


@torch.no_grad()
def _add(decomposer: Decomposer, source: Source, config: TailsConfig, index: np.ndarray, tally: _Tally, norms: dict) -> Int[Tensor, " N"]:
    """Take in some rows; returns the document of each scored position."""
    units = [(layer, end) for layer in decomposer.layers for end in ("in", "out")]
    points = clean_points(decomposer) | {f"{layer}.mlp.{end}" for layer, end in units}
    batch = with_clean(source, source.batch(config.split, index), points)
    assert batch.doc is not None
    kept = clean_rows(decomposer, positions(batch, source.target.keeps_first))
    doc = batch.doc.view(-1, *[1] * (kept.dim() - 1)).expand(kept.shape)[kept].cpu().long()
    codes = clean_codes(decomposer, batch)
    for site in decomposer.sites:
        code = codes[site.name]
        lengths = write_norms(decomposer, site).to(code.strength.device)
        tally.add(site.name, code.strength[kept].double().abs() * lengths, code.active[kept], doc)
    for layer, end in units:
        value = clean_rows(decomposer, batch.clean[f"{layer}.mlp.{end}"])[kept]
        norms.setdefault((layer, end), []).append(value.double().square().sum(-1).cpu())
    return doc


def _of_components(decomposer: Decomposer, tally: _Tally, weights: np.ndarray, seen: np.ndarray) -> Iterator[dict[str, Any]]:
    for metric, name in (("tail_share", "share"), ("tail_active", "active")):
        found = {site: tally.ratios(name, site.name, weights, seen) for site in decomposer.sites}
        for place, rank in enumerate(tally.ranks):
            there = {site: ratios[:, place] for site, ratios in found.items() if ratios.shape[1] > place}
            for site, ratios in there.items():
                own = {"layer": str(site.layer), "site": site.name, "condition": condition(rank=rank)}
                yield {"metric": metric, **own, **spread(ratios, len(seen))}
            if there:
                mean = np.mean(list(there.values()), axis=0)
                yield {"metric": metric, "condition": condition(rank=rank), **spread(mean, len(seen))}


def _of_tokens(config: TailsConfig, norms: dict, doc: np.ndarray, weights: np.ndarray, seen: np.ndarray) -> Iterator[dict[str, Any]]:
    """The same for every run: what the largest tokens, as many as a share of all, hold of a layer's squared norm."""
    place = np.searchsorted(seen, doc)
    for (layer, end), parts in norms.items():
        value = torch.cat(parts).numpy()
        whole = weights @ np.bincount(place, value, len(seen))
        for share in config.shares:
            largest = value >= np.sort(value)[-max(1, round(share * len(value)))]
            held = weights @ np.bincount(place, value * largest, len(seen))
            own = {"metric": "token_share", "layer": str(layer), "site": end, "condition": condition(share=share)}
            yield {**OF_TARGET, "family": "target", **own, **spread(held / whole, len(seen))}


def _seconds(config: TailsConfig) -> float:
    return 5 + config.tokens / 1500


MEASUREMENT = Measurement(1, TailsConfig, measure, METRICS, _seconds)
