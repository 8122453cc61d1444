"""SPD's reconstruction losses: which masks, and which maps they are put on at once.

| loss | masks | maps |
|---|---|---|
| `stochastic`, `layerwise`, `subset` | g + (1 - g) r with uniform r, and of the remainder r | all, one at a time, a random subset |
| `ci_masked`, `ci_layerwise`, `ci_subset` | g, without the remainder | all, one at a time, a random subset |
| `unmasked` | one, without the remainder | all |
| `self_gated` | as `stochastic`, with g of the masked pass itself | all |
| `self_masked` | as `ci_masked`, with g of the masked pass itself | all |

Every map that is not masked is the target's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from decomp_bench.decomposer import Batch, Codes, Point, SiteCodes, layer_of

from ._importance import Penalty, importances
from ._masks import interpolate, uniform_subset
from ._reconstruction import Rows, divergence, masked, placed, reading_error

if TYPE_CHECKING:
    from .spd import SPD

Lower = dict[Point, Tensor]
Mask = Callable[["SPD", Tensor, Rows, "Tensor | None"], SiteCodes]
"""Codes of one site from its lower importances, at the chosen rows (None: all)."""


def at_random(spd: SPD, g: Float[Tensor, "rows C"], rows: Rows, chosen: Tensor | None) -> SiteCodes:
    """Masks between the importance and one."""
    return masked(g, rows, chosen, spd.uniforms, spd.config.delta)


def importance(_spd: SPD, g: Float[Tensor, "rows C"], rows: Rows, chosen: Tensor | None) -> SiteCodes:
    """The importances as masks."""
    return placed(g, None, rows, chosen)


def everything(_spd: SPD, g: Float[Tensor, "rows C"], rows: Rows, chosen: Tensor | None) -> SiteCodes:
    """Masks of one."""
    return placed(torch.ones_like(g), None, rows, chosen)


def _codes(spd: SPD, mask: Mask, rows: Rows, lower: Lower, chosen: Callable[[int, Point], Tensor | None] = lambda _place, _name: None
           ) -> Codes:
    return {name: mask(spd, g, rows, chosen(place, name)) for place, (name, g) in enumerate(lower.items())}


def all_at_once(spd: SPD, batch: Batch, rows: Rows, lower: Lower, mask: Mask) -> Float[Tensor, ""]:
    """The error with every map masked, mean over draws."""
    draws = [divergence(spd, batch, rows, _codes(spd, mask, rows, lower), spd.layers) for _ in range(_draws(spd, mask))]
    return torch.stack(draws).mean()


def one_at_a_time(spd: SPD, batch: Batch, rows: Rows, lower: Lower, mask: Mask) -> Float[Tensor, ""]:
    """The error with one map masked, mean over maps and draws."""
    none = torch.zeros(len(rows.weight), dtype=torch.bool, device=rows.weight.device)
    draws = [
        divergence(spd, batch, rows, _codes(spd, mask, rows, lower, lambda _, other, name=name: None if other == name else none),
                   (layer_of(name),))
        for name in lower for _ in range(_draws(spd, mask))
    ]  # fmt: skip
    return torch.stack(draws).mean()


def some_at_once(spd: SPD, batch: Batch, rows: Rows, lower: Lower, mask: Mask) -> Float[Tensor, ""]:
    """The error with a random subset of the maps masked, drawn for each row, mean over draws."""
    draws = []
    for _ in range(spd.config.samples):
        routed = uniform_subset(len(rows.weight), len(lower), spd.uniforms, rows.weight.device)
        codes = _codes(spd, mask, rows, lower, lambda place, _, routed=routed: routed[:, place])
        draws.append(divergence(spd, batch, rows, codes, spd.layers))
    return torch.stack(draws).mean()


class OwnMasks:
    """Masks of every position from the logits of the masked pass itself: at random, or the importances; `cost` is their minimality."""

    def __init__(self, spd: SPD, rows: Rows, penalty: Penalty, random: bool) -> None:
        self.spd, self.rows, self.penalty, self.random = spd, rows, penalty, random
        self.cost = rows.weight.new_zeros(())

    def __call__(self, strength: Float[Tensor, "*rows C"], z: Float[Tensor, "*rows C"]) -> SiteCodes:
        """Codes of one site."""
        flat, rows, config, uniforms = z.flatten(0, -2), self.rows, self.spd.config, self.spd.uniforms
        weight = rows.weight if rows.index is None else flat.new_zeros(len(flat)).index_copy(0, rows.index, rows.weight)
        mask, cost, _ = importances(flat, weight, rows.count, self.penalty, config.sigmoid == "straight_through")
        self.cost = self.cost + cost
        if not self.random:
            return SiteCodes(strength, mask.view(z.shape))
        mask = interpolate(mask, uniforms.draw(*flat.shape, device=flat.device))
        return SiteCodes(strength, mask.view(z.shape), uniforms.draw(*z.shape[:-1], device=z.device) if config.delta else None)


def under_own_gates(spd: SPD, batch: Batch, rows: Rows, penalty: Penalty, random: bool) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The error with every map masked by importances of the masked pass itself, and what these cost; means over draws."""
    errors, costs = [], []
    for _ in range(spd.config.samples if random else 1):
        masks = OwnMasks(spd, rows, penalty, random)
        with spd.masking_itself(masks):
            errors.append(divergence(spd, batch, rows, None, spd.layers))
        costs.append(masks.cost)
    return torch.stack(errors).mean(), torch.stack(costs).mean()


def _draws(spd: SPD, mask: Mask) -> int:
    return spd.config.samples if mask is at_random else 1


STOCHASTIC = {"stochastic": all_at_once, "layerwise": one_at_a_time, "subset": some_at_once}
GIVEN = {
    "ci_masked": (all_at_once, importance),
    "ci_layerwise": (one_at_a_time, importance),
    "ci_subset": (some_at_once, importance),
    "unmasked": (all_at_once, everything),
}
OWN = {"self_gated": True, "self_masked": False}
"""Whether masks are random."""


def reconstructions(spd: SPD, batch: Batch, rows: Rows, lower: Lower, penalty: Penalty) -> dict[str, Tensor]:
    """Every term that has a weight, unweighted: the stochastic ones first. With them, the minimality of own gates."""
    chosen = {name: (error, at_random) for name, error in STOCHASTIC.items()} | GIVEN
    found = {name: error(spd, batch, rows, lower, mask) for name, (error, mask) in chosen.items() if getattr(spd.config, name)}
    own = {name: under_own_gates(spd, batch, rows, penalty, random) for name, random in OWN.items() if getattr(spd.config, name)}
    found |= {name: error for name, (error, _) in own.items()}
    if own and spd.config.self_importance:
        found["self_importance"] = spd.config.importance * torch.stack([cost for _, cost in own.values()]).mean()
    if spd.config.hidden:
        draws = [reading_error(spd, batch, rows, _codes(spd, at_random, rows, lower), spd.layers) for _ in range(spd.config.samples)]
        found["hidden"] = torch.stack(draws).mean()
    return found
