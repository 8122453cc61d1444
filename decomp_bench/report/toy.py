"""What is drawn of a run on a toy: importances on single features, the components' vectors, and neuron contributions, as plain data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decomp_bench import matching
from decomp_bench.decomposer import Decomposer, Site
from decomp_bench.recovery import codes_of, known_part, neuron_parts
from decomp_bench.report.reader import rounded
from decomp_bench.robustness import soft

LARGEST = 256
"""Features, dimensions and components beyond which nothing can be made out."""


@torch.no_grad()
def look(decomposer: Decomposer) -> dict[str, Any] | None:
    """Sites (importance [f, C] on one feature at a time, read and write vectors [C, d], vectors in a plane) and neurons of each layer.

    Entries that do not apply are None or empty. None as a whole where the target is no toy of known features, or too large a one.
    """
    toy, target = decomposer.target.toy, decomposer.target
    if toy is None or target.is_lm or len(toy.truth.probes) > LARGEST:
        return None
    importance = {name: codes.gate for name, codes in codes_of(soft(decomposer), toy.truth.probes).items()}
    sites = [_site(decomposer, site, importance.get(site.name)) for site in decomposer.sites if site.n <= 4 * LARGEST]
    neurons = [found for layer in decomposer.layers if (found := _neurons(decomposer, layer)) is not None]
    about = f"Target {target.uri} ({target.identity[:8]}), {decomposer.family} {decomposer.variant}, seed {decomposer.seed}."
    return {"about": about, "sites": sites, "by_neuron": neurons}


def _site(decomposer: Decomposer, site: Site, importance: Tensor | None) -> dict[str, Any]:
    assert decomposer.target.toy is not None
    truth = decomposer.target.toy.truth
    pair, of = _vectors(decomposer, site)
    part, plane = known_part(decomposer, site, truth), None
    if part is not None and isinstance(found := getattr(part, "other", None), Tensor) and found.shape[1] == 2 and part.has_lengths:
        longest = part.feature.gather(1, part.feature.abs().argmax(1, keepdim=True))  # type: ignore[union-attr]
        plane = {"target": _plain(part.true), "components": _plain(longest * found)}
    return {
        "name": site.name,
        "probe": rounded(float(truth.probes.abs().max())),
        "importance": _plain(importance) if importance is not None else None,
        "dense": truth.pattern.get(site.name) == "dense",
        "read": _plain(pair[0]) if pair is not None else None,
        "write": _plain(pair[1]) if pair is not None else None,
        "of": of,
        "plane": plane,
    }


def _vectors(decomposer: Decomposer, site: Site) -> tuple[tuple[Tensor, Tensor] | None, tuple[str, str]]:
    """Read and write vectors of a site's first slot, on the side of known features by their products with those; and what entries are."""
    assert decomposer.target.toy is not None
    slot, of = site.slots[0], ["dimensions", "dimensions"]
    pair = decomposer.directions(site, slot)
    if pair is None:
        return None, ("", "")
    vectors, known = list(pair), decomposer.target.toy.truth.mechanisms.get((slot.read, slot.write))
    if known is not None and known.side is not None:
        end = ("read", "write").index(known.side)
        vectors[end], of[end] = vectors[end] @ known.basis.T, "features"
    small = max(value.shape[1] for value in vectors) <= LARGEST
    return ((vectors[0], vectors[1]) if small else None), (of[0], of[1])


def _neurons(decomposer: Decomposer, layer: int) -> dict[str, Any] | None:
    parts = neuron_parts(decomposer, layer)
    if parts is None:
        return None
    pair = matching.contributions(*parts)
    correlation = rounded(matching.contribution_correlation(*parts))
    return {"layer": layer, "target": _plain(pair[0]), "components": _plain(pair[1]), "correlation": correlation}


def _plain(values: Tensor) -> list:
    return [_plain(row) for row in values] if values.dim() > 1 else [rounded(value) for value in values.double().tolist()]
