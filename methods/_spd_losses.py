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
OwnMask = Callable[["SPD", Tensor, Tensor], SiteCodes]
"""Codes of one site from its strengths and logits in the pass itself."""


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


def under_own_gates(spd: SPD, batch: Batch, rows: Rows, mask: OwnMask) -> Float[Tensor, ""]:
    """The error with every map masked by importances of the masked pass itself, mean over draws."""
    draws = []
    for _ in range(spd.config.samples if mask is drawn else 1):
        with spd.masking_itself(mask):
            draws.append(divergence(spd, batch, rows, None, spd.layers))
    return torch.stack(draws).mean()


def drawn(spd: SPD, strength: Float[Tensor, "*rows C"], z: Float[Tensor, "*rows C"]) -> SiteCodes:
    """Codes of one site with stochastic masks from its logits, at every position."""
    g = _lower(spd, z)
    mask = interpolate(g, spd.uniforms.draw(*g.shape, device=g.device)).view(z.shape)
    return SiteCodes(strength, mask, spd.uniforms.draw(*z.shape[:-1], device=z.device) if spd.config.delta else None)


def undrawn(spd: SPD, strength: Float[Tensor, "*rows C"], z: Float[Tensor, "*rows C"]) -> SiteCodes:
    """Codes of one site with the importances of its logits as masks, at every position."""
    return SiteCodes(strength, _lower(spd, z).view(z.shape))


def _lower(spd: SPD, z: Float[Tensor, "*rows C"]) -> Float[Tensor, "all_rows C"]:
    """Importances that are not paid for: minimality is that of the clean pass."""
    flat = z.flatten(0, -2)
    return importances(flat, flat.new_zeros(len(flat)), 1.0, Penalty("smooth_l0", 1.0), spd.config.sigmoid == "straight_through")[0]


def _draws(spd: SPD, mask: Mask) -> int:
    return spd.config.samples if mask is at_random else 1


STOCHASTIC = {"stochastic": all_at_once, "layerwise": one_at_a_time, "subset": some_at_once}
GIVEN = {
    "ci_masked": (all_at_once, importance),
    "ci_layerwise": (one_at_a_time, importance),
    "ci_subset": (some_at_once, importance),
    "unmasked": (all_at_once, everything),
}
OWN = {"self_gated": drawn, "self_masked": undrawn}


def reconstructions(spd: SPD, batch: Batch, rows: Rows, lower: Lower) -> dict[str, Tensor]:
    """Every term that has a weight, unweighted: the stochastic ones first."""
    chosen = {name: (error, at_random) for name, error in STOCHASTIC.items()} | GIVEN
    found = {name: error(spd, batch, rows, lower, mask) for name, (error, mask) in chosen.items() if getattr(spd.config, name)}
    found |= {name: under_own_gates(spd, batch, rows, mask) for name, mask in OWN.items() if getattr(spd.config, name)}
    if spd.config.hidden:
        draws = [reading_error(spd, batch, rows, _codes(spd, at_random, rows, lower), spd.layers) for _ in range(spd.config.samples)]
        found["hidden"] = torch.stack(draws).mean()
    return found
