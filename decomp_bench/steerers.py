"""Ways to steer to a concept before their strength is set: chosen components, random ones like them, and directions without components."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from decomp_bench import directions
from decomp_bench.auroc import auroc
from decomp_bench.concepts.sample import Sample
from decomp_bench.decomposer import Decomposer
from decomp_bench.forms import Form
from decomp_bench.intervene import Intervention, one
from decomp_bench.selection import Found, Scores, best, components, controls
from decomp_bench.steering import Ground

Fitted = tuple[directions.Outputs, Tensor, Tensor]
"""What `directions.outputs` returns."""


@dataclass(frozen=True)
class Steerer:
    """One way to steer, before its strength is set; `auroc` is how well it tells the concept on fold A."""

    name: str
    decomposer: Decomposer
    intervention: Intervention
    layer: int
    site: str
    component: int
    auroc: float


def component_steerers(decomposer: Decomposer, found: Scores, form: Form, c: int, met: Ground) -> tuple[Steerer | None, list[Steerer]]:
    """The component of a form's sites that tells concept `c` best, and random ones of its site that are as often active."""
    picked = best(found, c, 1, form.sites)
    drawn = controls(found, picked * met.config.controls, c, np.random.default_rng([met.config.seed, c]))
    ways = [_of(decomposer, form, component) for component in (*picked, *drawn)]
    return (ways[0] if picked else None), ways[1:]


def _of(decomposer: Decomposer, form: Form, found: Found) -> Steerer:
    layer = next(site.layer for site in decomposer.sites if site.name == found.site)
    intervention = Intervention(form.kind, components([found]), layers=(layer,) if form.source_only else None)
    return Steerer(form.name, decomposer, intervention, layer, found.site, found.component, found.auroc)


def direction_steerers(met: Ground, fitted: Fitted, c: int) -> tuple[list[Steerer], list[Steerer]]:
    """Difference in means, probe and fine-tuned direction at the layer where the difference in means tells best, and random ones there;
    none where fold A lacks the concept or has nothing else."""
    outputs, row, held = fitted
    holds, config, target = held[:, c], met.config, met.untouched.target
    if not 0 < int(holds.sum()) < len(holds):
        return [], []
    layer, mean = best_layer(met.sample, fitted, c)
    y = outputs[layer]
    told = directions.mean_difference(y, holds)
    start, middle = told.to(target.device), mean.to(target.device)
    tuned = directions.rank_one_finetuned(target, met.sample, c, layer, start, middle, steps=config.reft_steps, seed=config.seed)
    drawn = torch.randn(config.controls, len(told), generator=torch.Generator().manual_seed(config.seed + c))
    vectors = torch.cat([torch.stack([told, directions.probe(y, holds), tuned]), drawn])
    names = ("difference in means", "probe", "ReFT-r1", *["random direction"] * config.controls)
    bank = directions.Directions.of(target, {layer: vectors}, {layer: mean})
    site = bank.sites[0].name
    made = [
        Steerer(name, bank, Intervention("add", one(site, i)), layer, site, i, direction_auroc(y @ vectors[i], row, holds, met.sample, c))
        for i, name in enumerate(names)
    ]
    return made[: -config.controls], [replace(way, component=-1) for way in made[-config.controls :]]


def best_layer(sample: Sample, fitted: Fitted, c: int) -> tuple[int, Tensor]:
    """The layer at whose output the difference in means tells a concept best on fold A, and the mean output there."""
    outputs, row, held = fitted
    told = {}
    for layer, y in outputs.items():
        told[layer] = direction_auroc(y @ directions.mean_difference(y, held[:, c]), row, held[:, c], sample, c)
    layer = max(told, key=lambda one_of: told[one_of])
    return layer, outputs[layer].mean(0)


def direction_auroc(strength: Tensor, row: Tensor, holds: Tensor, sample: Sample, c: int) -> float:
    """AUROC of a direction at tokens, or of its mean over rows for a topic: as for components."""
    if not sample.concepts[c].of_documents:
        return float(auroc(strength[:, None], holds[:, None]))
    total = torch.zeros(len(sample.index)).index_add_(0, row, strength)
    return float(auroc((total / torch.bincount(row, minlength=len(sample.index)))[:, None], sample.topic[:, c : c + 1]))
