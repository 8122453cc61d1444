"""Two decompositions of one target beside each other: whether they found the same components, and whether they compute the same.

Components of a site that both have (the same points read and written) are compared by their vectors and by their activity on the same
held-out positions. Vectors: |cosine| of the read vectors, of the write vectors, and of whole components as matrices, which no exchange
of sign or length between the two vectors changes (seed stability of parameter decompositions: Bushnaq et al. 2026; of dictionaries:
Paulo and Belrose 2025, arXiv 2501.16615). Activity: correlation of the gates and of the sizes of the gated strengths, Jaccard index of
the active positions. The replaced models: KL between them, beside the KL of the target to each. Only components that are active
somewhere count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from decomp_bench.banks import Bank, similarities
from decomp_bench.coactivity import Series, Together
from decomp_bench.data.sources import Source
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Batch, Decomposer, Site, SiteCodes
from decomp_bench.errors import UserError
from decomp_bench.metrics.observe import Scored, log_probabilities
from decomp_bench.replacement import clean_codes, clean_points, clean_rows
from decomp_bench.robustness import soft

SHARED = 0.7
"""Similarity from which a pair counts as shared (Paulo and Belrose 2025)."""
NULLS, BATCH = 3, 16
"""Random banks behind a null, and sequences that are encoded together."""
Progress = Callable[[dict[str, Any]], None]
Pairs = tuple[np.ndarray, np.ndarray]
Alive = list[dict[str, Tensor]]
"""Of either side, which components of each site are active at some position."""


@torch.no_grad()
def align(
    first: Decomposer, second: Decomposer, source: Source, tokens: int = 20_000, split: str = "test", seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Tidy rows: site (`all`: mean over sites), aspect, measure, value, null, and how many components of either side are alive.

    Aspects read, write and whole (of vectors), gate, activity and active (on `tokens` held-out tokens) have the measures `one_to_one`
    (mean similarity in the best one-to-one matching, 0 for components of the larger side that are left over; aspects of activity are
    read off the matching of whole components, where left-over ones do not count), `nearest_first` and `nearest_second` (mean over the
    components of that side of the largest similarity with any of the other), and `shared` (share of the larger side whose partner is at
    least 0.7 alike). The null of vectors is that of random directions in the second's place, as many as it has; that of activity is the
    second's activity at other positions. Aspect `output` has the measures kl_A_B (nats per token; mse_A_B of a toy) of target, first and
    second. Raises UserError where the targets differ, or no site is shared.
    """
    sites = shared_sites(first, second)
    rows, size = source.evaluation_rows(split, tokens), BATCH * source.rows_a_sequence
    index = [np.arange(start, min(rows, start + size)) for start in range(0, rows, size)]

    def batches(part: int, points: set[str], logits: bool) -> Iterator[Batch]:
        for number, one in enumerate(index):
            if progress:
                progress({"phase": "comparing components", "batch": part * len(index) + number + 1, "batches": 2 * len(index)})
            yield with_clean(source, source.batch(split, one), points, logits)

    views = soft(first), soft(second)
    alive = _alive(views, sites, batches(0, first.points() | second.points(), False))
    together, outputs = {site.name: Together() for site in sites}, _Outputs(first, second)
    for batch in batches(1, clean_points(first) | clean_points(second), True):
        _add(together, views, alive, batch)
        outputs.add(batch)
    generator, found = torch.Generator().manual_seed(seed), []
    for site in sites:
        banks = [Bank.of(one, site, on[site.name]) for one, on in zip((first, second), alive, strict=True)]
        counts = {f"n_{side}": int(on[site.name].sum()) for side, on in zip(("first", "second"), alive, strict=True)}
        found += [{"site": site.name, **row, **counts} for row in _site_rows(banks[0], banks[1], together[site.name], generator)]
    frame = pd.DataFrame(found)
    return pd.concat([frame, _means(frame), outputs.rows()], ignore_index=True)


def shared_sites(first: Decomposer, second: Decomposer) -> list[Site]:
    """The sites that both have, as the first orders them; raises UserError where there is none."""
    if first.target.identity != second.target.identity:
        raise UserError(f"the runs decompose different models ({first.target.uri} and {second.target.uri}): compare two of one target")
    other = {site.name: site.slots for site in second.sites}
    found = [site for site in first.sites if other.get(site.name) == site.slots]
    if not found:
        names = [", ".join(site.name for site in one.sites) for one in (first, second)]
        raise UserError(f"no site reads and writes the same in both ({names[0]}; {names[1]}): take two of one kind")
    return found


# ---- activity and outputs


def _kept(decomposer: Decomposer, batch: Batch) -> Tensor:
    return clean_rows(decomposer, positions(batch, decomposer.target.keeps_first))


def _alive(views: tuple[Decomposer, Decomposer], sites: list[Site], batches: Iterator[Batch]) -> Alive:
    found: Alive = [{}, {}]
    for batch in batches:
        for view, on in zip(views, found, strict=True):
            codes, kept = clean_codes(view, batch), _kept(view, batch)
            for site in sites:
                fired = codes[site.name].active[kept].any(0)
                on[site.name] = on[site.name] | fired if site.name in on else fired
    return found


def _add(together: dict[str, Together], views: tuple[Decomposer, Decomposer], alive: Alive, batch: Batch) -> None:
    codes, kept = [clean_codes(view, batch) for view in views], _kept(views[0], batch)
    for name, sums in together.items():
        sums.add(_series(codes[0][name], kept, alive[0][name]), _series(codes[1][name], kept, alive[1][name]))


def _series(codes: SiteCodes, kept: Tensor, alive: Tensor) -> Series:
    return tuple(value[kept][:, alive] for value in (codes.gate.float(), codes.value.abs().float(), codes.active))  # type: ignore[return-value]


class _Outputs:
    """How far the two replaced models and the target are apart, under cascading with clean gates, in the layers that both replace."""

    def __init__(self, first: Decomposer, second: Decomposer) -> None:
        self.sides = first, second
        self.layers = tuple(layer for layer in first.layers if layer in second.layers)
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, batch: Batch) -> None:
        """Take in a batch."""
        target = self.sides[0].target
        scored = Scored.of(batch, target.is_lm)
        first, second = (side.replaced(batch, self.layers, gates="clean").logits for side in self.sides)
        assert batch.logits is not None
        of = {"target": batch.logits, "first": first, "second": second}
        for one, other in (("first", "second"), ("second", "first"), ("target", "first"), ("target", "second")):
            apart, count = _apart(of[one], of[other], scored)
            key = f"{'kl' if target.is_lm else 'mse'}_{one}_{other}"
            self.sums[key] = self.sums.get(key, 0.0) + apart
        self.count += count

    def rows(self) -> pd.DataFrame:
        """A row for each pair."""
        return pd.DataFrame([{"site": "all", **_row("output", key, value / self.count, np.nan)} for key, value in self.sums.items()])


def _apart(one: Tensor, other: Tensor, scored: Scored) -> tuple[float, int]:
    """Sum over scored tokens of KL(one || other), or over rows of the mean squared difference, and how many there are."""
    if scored.next_kept is None:
        return float((one - other).double().square().flatten(1).mean(1).sum()), len(one)
    log_one, log_other = log_probabilities(one), log_probabilities(other)
    kl = (log_one.exp() * (log_one - log_other)).sum(-1).double() * scored.next_kept
    return float(kl.sum()), int(scored.next_kept.sum())


# ---- measures


def _row(aspect: str, measure: str, value: float, null: float) -> dict[str, Any]:
    return {"aspect": aspect, "measure": measure, "value": value, "null": null}


def _site_rows(first: Bank, second: Bank, together: Together, generator: torch.Generator) -> list[dict[str, Any]]:
    own, activity, rows = similarities(first, second), together.similarities(), []
    chance = [similarities(first, second.random(generator)) for _ in range(NULLS)]
    for aspect, similarity in own.items():
        nulls = [measures(null[aspect], paired(null[aspect])) for null in chance]
        found = measures(similarity, paired(similarity))
        rows += [_row(aspect, key, value, float(np.mean([null[key] for null in nulls]))) for key, value in found.items()]
    pairs = paired(own["whole"] if own else activity["activity"][0])
    for aspect, (similarity, null) in activity.items():
        found, apart = measures(similarity, pairs, False), measures(null, pairs, False)
        rows += [_row(aspect, key, value, apart[key]) for key, value in found.items()]
    return rows


def paired(similarity: Float[Tensor, "n m"]) -> Pairs:
    """The best one-to-one matching (Hungarian)."""
    return linear_sum_assignment(similarity.nan_to_num(nan=-1.0).double().cpu().numpy(), maximize=True)


def measures(similarity: Float[Tensor, "n m"], pairs: Pairs, padded: bool = True) -> dict[str, float]:
    """Of a similarity and a matching; with `padded`, components that are left over count as 0. What is not defined does not count."""
    values = similarity.double().cpu().numpy()
    if not values.size:
        return dict.fromkeys(("one_to_one", "nearest_first", "nearest_second", "shared"), float("nan"))
    partner, larger = values[pairs], max(values.shape)
    partner = partner[~np.isnan(partner)]
    best = [one[np.isfinite(one)] for one in (np.where(np.isnan(values), -np.inf, values).max(axis) for axis in (1, 0))]
    one_to_one = partner.sum() / larger if padded else partner.mean() if len(partner) else np.nan
    nearest = [float(one.mean()) if len(one) else np.nan for one in best]
    shared = float((partner >= SHARED).sum() / larger)
    return {"one_to_one": float(one_to_one), "nearest_first": nearest[0], "nearest_second": nearest[1], "shared": shared}


def _means(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over sites, and components of all of them."""
    keys = ["aspect", "measure"]
    sums = frame.groupby(keys, sort=False)[["n_first", "n_second"]].sum()
    means = frame.groupby(keys, sort=False)[["value", "null"]].mean()
    return means.join(sums).reset_index().assign(site="all")
