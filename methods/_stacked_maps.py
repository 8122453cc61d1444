"""A toy's model with the decomposed maps of several decompositions at once: the first dimension of what it reads and gives counts them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from decomp_bench.decomposer import Point
    from decomp_bench.targets import TargetModel

Written = Callable[[Tensor], Tensor]
"""What a replaced map writes [S, rows, d_out], without its bias, of what it reads [S, rows, d_in]."""


class StackedMaps:
    """The maps `own` (point -> weight and bias) of a copy of the target's model: replaced in some passes, and noting what they read."""

    def __init__(self, target: TargetModel, own: Mapping[Point, tuple[Tensor, Tensor | None]]) -> None:
        self.own = own
        self.written: Mapping[Point, Written] = {}
        self.seen: dict[Point, Tensor] = {}
        self.model = copy.deepcopy(target.module)
        for point in own:
            parent, _, name = target.path(point).rpartition(".")
            setattr(self.model.get_submodule(parent), name, _Map(self, point))

    def run(self, x: Tensor, written: Mapping[Point, Written]) -> tuple[Tensor, dict[Point, Tensor]]:
        """The output [S, rows, d] with these maps replaced, and what each map read."""
        self.written, self.seen = written, {}
        output, seen = self.model(x), self.seen
        self.written, self.seen = {}, {}
        return output, seen

    def __call__(self, point: Point, x: Tensor) -> Tensor:
        """What a map gives."""
        self.seen[point] = x
        weight, bias = self.own[point]
        if point not in self.written:
            return F.linear(x, weight, bias)
        value = self.written[point](x)
        return value if bias is None else value + bias


class _Map(nn.Module):
    def __init__(self, maps: StackedMaps, point: Point) -> None:
        super().__init__()
        self.maps, self.point = maps, point

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(self.point, x)
