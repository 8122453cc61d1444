"""Steering and ablation of chosen components, for every method through the one edit door.

An intervention changes the values of some components and nothing else: the reconstruction error is kept, so that a place gives
f(x) + decode(edited) - decode(unedited). Without an edit, and where only inactive components are ablated, the logits are the clean ones
bit for bit. How strong an intervention is, is what it does to the MLP outputs, |dy| / |y|: raw factors mean another thing for every method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from decomp_bench.conditions import upstream
from decomp_bench.data.streams import positions
from decomp_bench.decomposer import Batch, Decomposer, Protocol, Site, SiteCodes, layer_of
from decomp_bench.errors import UserError
from decomp_bench.replacement import Replaced, replaced

Kind = Literal["zero", "scale", "add", "clamp", "open", "keep"]
Components = Mapping[str, Mapping[int, float]]
"""Site name -> component -> weight; the sign of a weight is the direction in which the component is pushed."""


@dataclass(frozen=True)
class Intervention:
    """What is done to some components, at every position but a kept first one.

    With v a component's value (strength times gate), w its weight and a the amount: `zero` v -> 0; `scale` v -> a v; `add` v -> v + a w;
    `clamp` v -> a w; `open` v -> a w strength, the method's own gate opened; `keep` v -> 0 for every other component of the sites
    named. The amount is a number, or a tensor [B, 1] or [B, T] over rows and positions. `layers` are the layers whose units are
    changed; None: all that the sites write to (for a component with many writes, its own layer alone is the source-only form).
    """

    kind: Kind
    components: Components
    amount: float | Tensor = 1.0
    layers: tuple[int, ...] | None = None

    def edit(self, site: Site, codes: SiteCodes) -> SiteCodes:
        """The edit that the replaced pass calls for each site."""
        if site.name not in self.components:
            return codes
        if codes.delta is not None:
            raise UserError("an intervention keeps the error, which holds the dense remainder: take the decomposition with delta off")
        chosen = self.components[site.name]
        index = torch.tensor(sorted(chosen), dtype=torch.int64, device=codes.gate.device)
        if self.kind in ("zero", "keep"):
            kept = codes.gate.new_full((site.n,), float(self.kind == "zero"))
            kept[index] = float(self.kind == "keep")
            return replace(codes, gate=codes.gate * kept)
        weight = torch.tensor([chosen[i] for i in sorted(chosen)], dtype=codes.gate.dtype, device=codes.gate.device)
        new = self._values(codes.value[..., index], codes.strength[..., index], weight)
        opened = torch.ones_like(new)
        return replace(codes, strength=codes.strength.index_copy(-1, index, new), gate=codes.gate.index_copy(-1, index, opened))

    def _values(self, value: Tensor, strength: Tensor, weight: Tensor) -> Tensor:
        amount = self.amount[..., None] if isinstance(self.amount, Tensor) else self.amount
        if self.kind == "scale":
            return value * amount
        if self.kind == "open":
            return strength * amount * weight
        pushed = (amount * weight).expand_as(value)
        return value + pushed if self.kind == "add" else pushed


def one(site: str, component: int, weight: float = 1.0) -> dict[str, dict[int, float]]:
    """A single component."""
    return {site: {component: weight}}


def layers_of(decomposer: Decomposer, intervention: Intervention) -> tuple[int, ...]:
    """Layers whose units an intervention changes; raises UserError for a site or component that is not there."""
    sites = {site.name: site for site in decomposer.sites}
    for name, chosen in intervention.components.items():
        if name not in sites:
            raise UserError(f"{decomposer.name} has no site '{name}'; it has {', '.join(sites)}")
        wrong = [i for i in chosen if not 0 <= i < sites[name].n]
        if wrong:
            raise UserError(f"site {name} has components 0 to {sites[name].n - 1}; got {wrong[0]}")
    written = {layer_of(slot.write) for name in intervention.components for slot in sites[name].slots}
    return tuple(sorted(written if intervention.layers is None else written & set(intervention.layers)))


def intervened(decomposer: Decomposer, batch: Batch, intervention: Intervention | None, protocol: Protocol = "cascading") -> Replaced:
    """The target's pass with an intervention. Later layers, and gates there, see the changed stream; the clean pass gates methods whose
    gates are not upstream of their sites (the batch must then carry its clean activations)."""
    edit = intervention.edit if intervention else None
    layers = layers_of(decomposer, intervention) if intervention else decomposer.layers
    return replaced(decomposer, batch, layers, protocol, "self" if upstream(decomposer) else "clean", edit, keep_error=True)


@torch.no_grad()
def perturbation(decomposer: Decomposer, batch: Batch, intervention: Intervention) -> float:
    """Mean |dy| over mean |y| of the changed MLP outputs on clean inputs; over several layers the root of the sum of squares.

    The batch carries clean activations (`clean_points`). Padding and a kept first position do not count.
    """
    out = intervened(decomposer, batch, intervention, "clean").outputs
    if not out:
        raise UserError("the intervention changes no MLP output: its strength is measured there")
    first = int(decomposer.target.keeps_first)
    kept = positions(batch, decomposer.target.keeps_first)[:, first:] if decomposer.target.is_lm else positions(batch, False)
    total = 0.0
    for layer, value in out.items():
        clean = batch.clean[f"{layer}.mlp.out"]
        clean = (clean[:, first:] if first else clean)[kept]
        total += float((value[kept] - clean).norm(dim=-1).mean() / clean.norm(dim=-1).mean()) ** 2
    return total**0.5


def matched(decomposer: Decomposer, batch: Batch, intervention: Intervention, ratio: float, tolerance: float = 0.01) -> Intervention | None:
    """The intervention with the amount at which its perturbation is `ratio` (see `perturbation`); None where none is found.

    An amount is searched by proportion, which is exact after one step where the output is linear in it. `scale` is searched above one.
    """
    base = 1.0 if intervention.kind == "scale" else 0.0
    size = 1.0
    for _ in range(40):
        found = replace(intervention, amount=base + size)
        measured = perturbation(decomposer, batch, found)
        if abs(measured - ratio) <= tolerance * ratio:
            return found
        size *= min(8.0, ratio / measured) if measured > 0 else 8.0
        if not 1e-9 < size < 1e9:
            return None
    return None
