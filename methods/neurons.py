"""Floor: the MLP's own hidden units as components, the strongest of each row kept."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from decomp_bench.config import MethodConfig
from decomp_bench.decomposer import Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot, layer_of
from decomp_bench.targets import TargetModel

from ._sparse import top_of_rows


class FloorConfig(MethodConfig):
    """Config of a decomposition that is not trained."""

    steps: int = 0
    k: PositiveInt = 16
    """Components kept in a row, of each site."""


def geometric(n: int, first: int = 4) -> list[Choice]:
    """Choices of k from `first` in steps of about 2.8 (4, 11, 32, 91, ...), and all n components."""
    ks = [round(first * 8 ** (i / 2)) for i in range(n.bit_length()) if round(first * 8 ** (i / 2)) < 0.75 * n]
    return [Choice(k=k) for k in [*ks, n]]


class Neurons(Decomposer):
    """A site for each MLP; a component's strength is its hidden activation, computed by the target's own maps."""

    name = "neurons"
    summary = "floor: hidden units of each MLP, top k by |activation| times |write vector|"
    Config = FloorConfig
    config: FloorConfig  # type: ignore[assignment]
    trainable = False
    swept = ("k",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {}, "laptop": {}, "paper": {}}

    def build(self, generator: torch.Generator) -> None:
        for layer in self.layers:
            slot = Slot(f"{layer}.mlp.in", f"{layer}.mlp.out")
            self.sites.append(Site(str(layer), layer, (slot.read,), (slot,), self.target.size(f"{layer}.mlp.down")))

    def bind(self, target: TargetModel) -> None:
        """Also take hold of the MLPs themselves: while layers are replaced, the target's paths lead to their replacements."""
        super().bind(target)
        parts = {layer: (target.part(f"{layer}.mlp"), target.part(f"{layer}.mlp.down")) for layer in self.layers}
        object.__setattr__(self, "_parts", parts)

    _parts: dict[int, tuple[nn.Module, nn.Module]]

    @classmethod
    def skip(cls, target: TargetModel, layers: tuple[int, ...]) -> str | None:
        missing = [layer for layer in layers if f"{layer}.mlp.down" not in target.map_paths]
        return f"{target.uri} has no MLP of linear maps at layer {missing[0]}" if missing else None

    def hidden(self, layer: int, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows n"]:
        """What the MLP's last map reads."""
        mlp, down = self._parts[layer]
        found: list[Tensor] = []
        handle = down.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
        try:
            mlp(x)
        finally:
            handle.remove()
        return found[0]

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        codes: Codes = {}
        for site in self.sites:
            if site.reads[0] not in inputs or (gates is not None and site.name not in gates):
                continue
            strength = self.hidden(site.layer, inputs[site.reads[0]])
            if gates is not None:
                gate = gates[site.name].gate
            else:
                lengths = self._parts[site.layer][1].weight.float().norm(dim=0)  # type: ignore[union-attr, operator]
                gate = top_of_rows(strength.abs() * lengths, self.choice.k or self.config.k).to(strength.dtype)
            codes[site.name] = SiteCodes(strength, gate)
        return codes

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        site = next(site for site in self.sites if site.slots[0].write == write)
        return self._parts[site.layer][1](codes[site.name].value)

    def component_sizes(self, site: Site) -> int:
        reads = [point for point in self.target.maps(site.layer) if not point.endswith(".down")]
        return sum(self.target.size(point) for point in reads) + self.target.width

    def constant_size(self, write: Point) -> int:
        bias = self._parts[layer_of(write)][1].bias
        return 0 if bias is None else bias.numel()  # type: ignore[operator]

    def directions(self, site: Site, slot: Slot) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Rows of the first map (the gate's, where there is one: it decides whether a unit is on) and columns of the last."""
        return self.target.weight(self.target.maps(site.layer)[0]), self.target.weight(f"{site.layer}.mlp.down").T

    @property
    def variant(self) -> str:
        return f"k={self.config.k}"

    def sweep(self) -> list[Choice]:
        return geometric(max(site.n for site in self.sites))
