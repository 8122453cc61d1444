"""What a component's write vector says to the output by itself: the logit lens (nostalgebraist 2020), for any target."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decomp_bench.decomposer import Decomposer, Point, Site
from decomp_bench.targets.base import TargetModel

AT_ONCE = 64
"""Directions that pass through the output head together."""


def residual_writes(decomposer: Decomposer, site: Site) -> Float[Tensor, "n d"] | None:
    """Write vectors into the residual stream, summed over the slots that write there; None where there is no such slot or no vector."""
    found = []
    for slot in site.slots:
        if _into_residual(decomposer.target, slot.write):
            vectors = decomposer.directions(site, slot)
            if vectors is None:
                return None
            found.append(vectors[1].detach().float())
    return torch.stack(found).sum(0) if found else None


def _into_residual(target: TargetModel, point: Point) -> bool:
    """Whether what is written at a point is what its unit adds to the stream: the unit's output, or that of its last map."""
    unit = ".".join(point.split(".")[:2])
    return point == f"{unit}.out" or point in target.maps(int(point.split(".")[0]), unit.split(".")[1])[-1:]


@torch.no_grad()
def through_output(target: TargetModel, directions: Float[Tensor, "m d"], inputs: int) -> Float[Tensor, "m out"]:
    """The output head's response to directions that stand in for the whole residual stream after the last block.

    The odd part of it, (head(v) - head(-v)) / 2: what a final norm or a head adds whatever it reads drops out. Under a final norm the
    length of v does not matter. `inputs` is the number of a toy's inputs; a language model takes any tokens.
    """
    parts = []
    for some in directions.to(target.device).split(min(AT_ONCE, target.context or AT_ONCE)):
        x = torch.zeros(1, len(some), dtype=torch.long) if target.is_lm else torch.zeros(len(some), inputs)
        signs = [_headed(target, x.to(target.device), sign * some) for sign in (1, -1)]
        parts.append(((signs[0] - signs[1]) / 2).cpu())
    return torch.cat(parts)


def _headed(target: TargetModel, x: Tensor, stream: Float[Tensor, "m d"]) -> Float[Tensor, "m out"]:
    def put(_module: Any, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        given = stream.to(first.dtype).reshape(first.shape)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handle = target.part(str(target.layers - 1)).register_forward_hook(put)
    try:
        return target(x).float().reshape(len(stream), -1)
    finally:
        handle.remove()
