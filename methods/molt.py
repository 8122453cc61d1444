"""Mixture of linear transforms: an MLP's output as a sparse sum of low-rank linear maps of its input, each switched on by a gate."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from decomp_bench.decomposer import Codes, Inputs, Point, Site, Slot
from decomp_bench.errors import UserError

from ._activations import worthwhile
from ._dictionary import Dictionary
from ._dictionary_config import PAPER, DictionaryConfig
from ._molt import MapsCoder


class MOLTConfig(DictionaryConfig):
    """What a dictionary's config says of components holds for transforms; their number follows from the groups."""

    lr: float = Field(default=1e-2, gt=0)
    transforms: PositiveInt = 4
    """Transforms of the first group; each further group has twice as many, of half the rank."""
    groups: PositiveInt = 5
    """Groups of equal rank."""
    rank: PositiveInt | None = None
    """Rank of the first group's transforms, at least one after halving. None: a quarter of the narrower side."""
    features: PositiveInt = 124
    """Transforms of a site: transforms * (2^groups - 1); not set by hand."""
    activation: Literal["relu", "topk", "batchtopk", "jumprelu"] = "batchtopk"  # type: ignore[assignment]
    """Which transforms are let through, by their gate times the norm of their map."""
    decoder_rows: Literal["free"] = "free"  # type: ignore[assignment]
    """Maps have any norm."""
    k: PositiveInt = 8
    """Active transforms of a row."""
    revive: Literal["aux", "pre_act", "none"] = "aux"  # type: ignore[assignment]
    """What brings dead transforms back."""
    aux_k: PositiveInt | None = 8
    """Dead transforms that a row may use for the aux loss."""

    @model_validator(mode="before")
    @classmethod
    def _count(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        first, groups = (data.get(key, cls.model_fields[key].default) for key in ("transforms", "groups"))
        if not isinstance(first, int) or not isinstance(groups, int) or not 0 < groups < 32:
            return data  # for the fields' own checks
        n = first * (2**groups - 1)
        if data.get("features", n) != n:
            raise ValueError(f"features={data['features']} does not follow from transforms={first} and groups={groups}, which give {n}")
        return {**data, "features": n}

    def ranks(self, width: int) -> list[tuple[int, int]]:
        """(transforms, rank) of each group, for a target whose narrower side has this width."""
        first = self.rank or max(1, width // 4)
        return [(self.transforms * 2**i, max(1, first // 2**i)) for i in range(self.groups)]


class _Absent:
    """Stands for an attribute of the base class that does not apply."""

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError("a mixture of linear transforms has no encoder and decoder alone")


class MOLT(Dictionary):
    """y = sum over t of phi(e_t x + b_t) U_t V_t x + b, in normalised coordinates; components are the transforms U_t V_t."""

    name = "molt"
    version: ClassVar[int] = 2  # since then a transform has as many coefficients as its rank
    summary = "sparse mixture of low-rank linear maps from each MLP's input to its output"
    Config = MOLTConfig
    config: MOLTConfig  # type: ignore[assignment]
    paper = "Lindsey et al. 2025, Sparse mixtures of linear transforms (transformer-circuits.pub/2025/bulk-update)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"transforms": 2, "groups": 4, "k": 4, "steps": 60, "batch": 256, "calibration": 4096},
        "laptop": {},
        "paper": {**{key: value for key, value in PAPER.items() if key != "features"}, "transforms": 2, "rank": 512},
    }
    folded: Any = _Absent()

    def read(self, layer: int) -> Point:
        return f"{layer}.mlp.in"

    def writes(self, layer: int) -> list[Point]:
        return [f"{layer}.mlp.out"]

    def build(self, generator: torch.Generator) -> None:
        super().build(generator)
        for place, site in enumerate(self.sites):
            d_in, d_out = self.target.size(site.slots[0].read), self.target.size(site.slots[0].write)
            groups = self.config.ranks(min(d_in, d_out))
            if groups[0][1] > min(d_in, d_out):
                raise UserError(f"method.rank={groups[0][1]} exceeds the width {min(d_in, d_out)} of {self.target.uri}; lower it")
            own = torch.Generator().manual_seed(generator.initial_seed() * 100_003 + site.layer)
            self.coders[site.name] = MapsCoder(self.config.at_layer(place), groups, d_in, d_out, own)

    def coder(self, site: Site) -> MapsCoder:
        return self.coders[site.name]  # type: ignore[return-value]

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        site = next(site for site in self.sites if site.slots[0].write == write)
        coder, value = self.coder(site), codes[site.name].value
        x, flat = coder.normalise(inputs[site.reads[0]]).flatten(0, -2), value.flatten(0, -2)
        support = worthwhile(flat != 0)
        strengths = flat if support is None else flat.flatten().index_select(0, support.index)
        return self.output(write).restore(coder.write(x, strengths, support).view(*value.shape[:-1], -1))

    def component_sizes(self, site: Site) -> Float[Tensor, " n"]:
        """A transform's factors and its gate vector."""
        d_in, d_out = self.target.size(site.slots[0].read), self.target.size(site.slots[0].write)
        return (self.coder(site).maps.ranks * (d_in + d_out) + d_in).float()

    def component_coefficients(self, site: Site) -> Float[Tensor, " n"]:
        return self.coder(site).maps.ranks.float()

    def directions(self, site: Site, slot: Slot) -> None:
        """None: a transform reads and writes as many directions as its rank."""
        return None
