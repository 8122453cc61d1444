"""A look at all components of a decomposition on held-out text: how densely they fire, and of some of them where and towards what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer, Site
from decomp_bench.report.firing import Firing, Peaks, batches, firing, strongest
from decomp_bench.report.lens import residual_writes, through_output
from decomp_bench.report.reader import Reader, rounded

if TYPE_CHECKING:
    from decomp_bench.report.components import Settings

DECADES, BINS_A_DECADE = 6, 3
"""The histogram of densities: from 10^-6 to 1."""
FEWEST = 4
"""Components of a site that are shown at least, however many sites there are."""


def survey(
    decomposer: Decomposer, source: Source, split: str, settings: Settings, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Densities of all components; contexts and output words of those that are shown. Plain data, as a page needs it."""
    rows = source.evaluation_rows(split, settings.tokens)
    given = partial(batches, decomposer, source, split, rows, progress)
    scored, counts = firing(decomposer, given())
    each = max(FEWEST, settings.shown // max(1, len(decomposer.sites)))
    chosen = {name: choose(found.active, each) for name, found in counts.items()}
    best = strongest(decomposer, given(), chosen, settings.contexts)
    reader = Reader(source, split)
    sites = []
    for site in decomposer.sites:
        outputs = _outputs(decomposer, site, chosen[site.name], reader)
        words = [_words(row, reader, settings.words) for row in outputs] if outputs is not None else None
        found = _components(counts[site.name], chosen[site.name], best[site.name], scored, reader, words)
        sites.append({**_about(site, counts[site.name], scored), "lens": words is not None, "components": found})
    about = {"split": split, "tokens": scored, "rows": rows, "corpus": source.name, "token_hash": source.token_hash(split, rows)}
    return {**about, "sites": sites}


def choose(active: Int[Tensor, " n"], most: int) -> Int[Tensor, " m"]:
    """At most this many of the components that fire, evenly spaced in their order of density, densest first.

    Each stands for a stratum of equally many components.
    """
    alive = active.nonzero()[:, 0]
    ranked = alive[active[alive].sort(descending=True, stable=True).indices]
    if len(ranked) <= most:
        return ranked
    return ranked[((torch.arange(most) + 0.5) * len(ranked) / most).long()]


def histogram(density: np.ndarray) -> list[int]:
    """How many components that fire lie in each third of a decade from 10^-6 to 1."""
    places = np.floor((np.log10(density[density > 0]) + DECADES) * BINS_A_DECADE).astype(int)
    return np.bincount(places.clip(0, DECADES * BINS_A_DECADE - 1), minlength=DECADES * BINS_A_DECADE).tolist()


def _about(site: Site, counts: Firing, scored: int) -> dict[str, Any]:
    density = (counts.active.double() / max(1, scored)).numpy()
    about = {"name": site.name, "layer": site.layer, "reads": list(site.reads), "writes": [slot.write for slot in site.slots]}
    return {**about, "n": site.n, "alive": int((density > 0).sum()), "densities": histogram(density)}


def _outputs(decomposer: Decomposer, site: Site, chosen: Int[Tensor, " m"], reader: Reader) -> Tensor | None:
    writes = residual_writes(decomposer, site) if len(chosen) else None
    return None if writes is None else through_output(decomposer.target, writes[chosen.to(writes.device)], reader.inputs)


def _words(outputs: Tensor, reader: Reader, most: int) -> dict[str, Any]:
    return {"up": reader.words(outputs, most), "down": reader.words(-outputs, most)}


def _components(
    counts: Firing, chosen: Int[Tensor, " m"], best: Peaks, scored: int, reader: Reader, words: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    found = []
    for place, index in enumerate(chosen.tolist()):
        active = int(counts.active[index])
        about = {"index": index, "density": rounded(active / scored), "mean": rounded(float(counts.size[index]) / active)}
        about |= {"peak": rounded(float(best.size[place, 0])), **(words[place] if words else {})}
        found.append({**about, "contexts": reader.contexts(best, place)})
    return found
