"""What is known of a toy target: its data, and the mechanisms that a decomposition should find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decomp_bench.targets.base import TargetModel

PROBE = 0.75
"""Value of the one active feature in the inputs on which importances are compared with the truth (SPD: 0.75 I)."""


@dataclass(frozen=True)
class Mechanisms:
    """The known rank-one parts of what happens between two points, one for each feature.

    On the side of the features, `basis` holds the activation that each feature alone causes: a component's vector there is taken by
    its products with these. On the other side mechanism i has the vector `vectors[i]`. So mechanism i is e_i (x) vectors[i] in
    features, and for a map W that reads features, vectors[i] = W basis[i]. `side` is the side of the features; None where a
    component only writes (an autoencoding one): then directions are all that is known, and no lengths.
    """

    basis: Float[Tensor, "f d_feature"]
    vectors: Float[Tensor, "f d_other"]
    side: Literal["read", "write"] | None = "read"


@dataclass(frozen=True)
class Hop:
    """A planted second hop: which variables, written by one layer along `basis`, are read by the next to make which outputs.

    `edges[i, j]`: variable i decides output j. `outputs` are the columns of the model's output that the second layer makes.
    """

    layer: int
    basis: Float[Tensor, "variables d"]
    edges: Bool[Tensor, "variables outputs"]
    outputs: slice


@dataclass(frozen=True)
class Truth:
    """Everything known of a toy.

    mechanisms: by (read, write) of a slot. live: components that a map should be left with. pattern: how the importances of a map
    should look on the probes: `identity`, one component a feature, or `dense`, the first `live` columns shared by all features.
    readout: output direction of each feature at the residual stream, where neurons have contributions. parent: for each feature
    the feature that is on whenever it is, or -1. read_later: for a map, the directions of its outputs that anything reads; where a map
    is not listed, all of them.
    """

    probes: Float[Tensor, "f d"]
    probability: float
    mechanisms: Mapping[tuple[str, str], Mechanisms] = field(default_factory=dict)
    live: Mapping[str, int] = field(default_factory=dict)
    pattern: Mapping[str, Literal["identity", "dense"]] = field(default_factory=dict)
    readout: Float[Tensor, "f width"] | None = None
    read_later: Mapping[str, Float[Tensor, "readers width"]] = field(default_factory=dict)
    hop: Hop | None = None
    parent: Int[Tensor, " f"] | None = None


@dataclass(frozen=True)
class Toy:
    """What a toy target carries: rows of its distribution `draw(rows, generator)`, a key that names the distribution, its truth.

    `rows` are drawn for training, a quarter as many for each other split; `block` of them together.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    key: str
    truth: Truth
    rows: int = 65_536
    block: int = 64


@torch.no_grad()
def responses(target: TargetModel, inputs: Float[Tensor, "f d"], point: str) -> Float[Tensor, "f d_point"]:
    """The activation at a point that each feature alone causes: on its input, less that on the zero input."""
    found, _ = target.clean(torch.cat([torch.zeros_like(inputs[:1]), inputs]), {point}, logits=False)
    value = found[point]
    return value[1:] - value[:1]


def written(target: TargetModel, inputs: Float[Tensor, "f d"], layer: int) -> dict[tuple[str, str], Mechanisms]:
    """Mechanisms of a whole MLP (read at its input or, autoencoding, at its output) as far as features act alone."""
    read, write = f"{layer}.mlp.in", f"{layer}.mlp.out"
    basis, vectors = (responses(target, inputs, point) for point in (read, write))
    return {(read, write): Mechanisms(basis, vectors), (write, write): Mechanisms(vectors, vectors, None)}
