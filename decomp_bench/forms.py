"""The ways in which a decomposition's components can be changed for steering and ablation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from decomp_bench.conditions import TRAINED
from decomp_bench.decomposer import Choice, Decomposer, layer_of
from decomp_bench.intervene import Kind


@dataclass(frozen=True)
class Form:
    """A way to change components: the kind of intervention, the sites it is for, and whether only their own layer is written to."""

    name: str
    kind: Kind
    sites: tuple[str, ...]
    source_only: bool = False


def everything_on(decomposer: Decomposer) -> tuple[Decomposer, Choice]:
    """A decomposition that was not trained with all its components on, since its sparsity is chosen at inference; others as trained."""
    choices = [] if decomposer.trainable else decomposer.sweep()
    return (decomposer.at(**vars(choices[-1])), choices[-1]) if choices else (decomposer, TRAINED)


def forms(decomposer: Decomposer) -> Iterator[Form]:
    """Components of matrices write linearly at the MLP's last map, or are opened by their own gates anywhere; others add what they write,
    those with several writes also at their own layer alone."""
    target, sites = decomposer.target, decomposer.sites
    of_maps = [site for site in sites if any(slot.write in target.map_paths for slot in site.slots)]
    last = [site for site in of_maps if any(slot.write.endswith(".mlp.down") for slot in site.slots)]
    rest = [site for site in sites if site not in of_maps]
    if last:
        yield Form("linear write", "add", tuple(site.name for site in last))
    if of_maps:
        yield Form("own gate", "open", tuple(site.name for site in of_maps))
    if rest:
        yield Form("write", "add", tuple(site.name for site in rest))
    if any(len({layer_of(slot.write) for slot in site.slots}) > 1 for site in rest):
        yield Form("write, source layer", "add", tuple(site.name for site in rest), source_only=True)
