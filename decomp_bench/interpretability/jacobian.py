"""Whether a replacement MLP responds to its input as the original does: their Jacobians at sampled positions.

Protocol. At a position of held-out text, J is the derivative of the layer's MLP output by the MLP's input there, both clean; J' is that of
what replaces it. Held constant: every other input (what sources at other layers read, other positions), and the gates, at those of the
clean pass. With gates that are on or off this is the derivative almost everywhere; of graded gates it leaves out the part through the
gate. Both are met with the same orthonormal vectors v: v^T J and v^T J', all d of them where the width is no larger than `probes`, so that
sums over v are the Frobenius norms and products themselves, and estimates of them up to a common factor otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from decomp_bench.concepts.sample import Sample, draw
from decomp_bench.config import Config
from decomp_bench.data.sources import Source
from decomp_bench.data.streams import with_clean
from decomp_bench.decomposer import Batch, Decomposer, layer_of
from decomp_bench.replacement import clean_codes, clean_points, replaced, unit_of

QUANTITIES: tuple[str, ...] = ("count", "target", "own", "both", "turned", "elsewhere", "cosine", "cosine_turned", "cosine_elsewhere")


class JacobianConfig(Config):
    """Where Jacobians are compared."""

    rows: PositiveInt = 24
    """Rows of held-out text."""
    positions: Annotated[int, Field(ge=2)] = 8
    """Positions of each row at most."""
    probes: PositiveInt = 32
    """Vectors that the Jacobians are met with."""
    batch: PositiveInt = 8
    """Rows that are differentiated together; nothing depends on it."""
    seed: int = 0
    bootstrap: Annotated[int, Field(ge=1)] = 2000
    """Document resamples behind every interval."""


@dataclass(frozen=True)
class Sums:
    """Of each document [D] and layer, the sums over its positions of `QUANTITIES` [D, quantities]."""

    by_layer: dict[int, Float[np.ndarray, "D q"]]


def layers_of(decomposer: Decomposer) -> list[int]:
    """Layers whose MLP output the decomposition replaces."""
    writes = {slot.write for site in decomposer.sites for slot in site.slots}
    return sorted({layer_of(point) for point in writes if unit_of(point).endswith(".mlp")} & set(decomposer.layers))


def sums(decomposer: Decomposer, source: Source, config: JacobianConfig, tick: Callable[[], None]) -> Sums:
    """Compare at every sampled position of fold C; `tick` is called once for each batch of rows and layer."""
    sample = draw(source, "C", (), config.rows, 0, config.seed)
    _, document = np.unique(sample.documents, return_inverse=True)
    layers, width = layers_of(decomposer), decomposer.target.width
    found = {layer: np.zeros((int(document.max()) + 1, len(QUANTITIES))) for layer in layers}
    generator = torch.Generator().manual_seed(config.seed)
    probes = _orthonormal(width, generator)[: config.probes].to(decomposer.target.device)
    turn = _orthonormal(width, generator).to(decomposer.target.device)
    for start in range(0, len(sample.index), config.batch):
        part = slice(start, min(start + config.batch, len(sample.index)))
        batch = with_clean(source, source.batch(sample.split, sample.index[part]), clean_points(decomposer), logits=False)
        row, place = _places(sample, part, config)
        for layer in layers:
            pair = jacobians(decomposer, batch, layer, (row, place), probes)
            np.add.at(found[layer], document[part][row], _quantities(*pair, turn, row))
            tick()
    return Sums(found)


def _orthonormal(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    return torch.linalg.qr(torch.randn(d, d, generator=generator))[0]


def _places(sample: Sample, part: slice, config: JacobianConfig) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"]]:
    """Random real positions of each row but a kept first one, drawn from the row's number alone."""
    first = int(sample.source.target.keeps_first)
    rows, places = [], []
    for i, (index, length) in enumerate(zip(sample.index[part], sample.length[part], strict=True)):
        drawn = np.random.default_rng([config.seed, int(index)]).permutation(np.arange(first, int(length)))[: config.positions]
        rows += [i] * len(drawn)
        places += sorted(drawn.tolist())
    return np.array(rows, np.int64), np.array(places, np.int64)


def jacobians(
    decomposer: Decomposer, batch: Batch, layer: int, at: tuple[np.ndarray, np.ndarray], probes: Float[Tensor, "p d"]
) -> tuple[Float[Tensor, "p s d"], Float[Tensor, "p s d"]]:
    """v^T J of the target's MLP and v^T J' of its replacement, for each probe v, at positions (rows [s], places [s])."""
    target, first, point = decomposer.target, int(decomposer.target.keeps_first), f"{layer}.mlp.in"
    with torch.no_grad():
        codes = clean_codes(decomposer, batch)
    u = batch.clean[point].detach().float().requires_grad_()
    here = Batch(batch.x, batch.length, batch.doc, {**batch.clean, point: u})

    def through(_x: Tensor) -> Tensor:
        return target.part(f"{layer}.mlp")(u)

    row, place = (torch.from_numpy(part).to(u.device) for part in at)
    with torch.enable_grad():
        own = replaced(decomposer, here, (layer,), "single", codes, forward=through).outputs[layer]
        original = target.part(f"{layer}.mlp")(u)
        outputs = (original[row, place], own[row, place - first])
    return tuple(torch.stack([_product(y, v, u)[row, place] for v in probes]) for y in outputs)  # type: ignore[return-value]


def _product(y: Float[Tensor, "s d"], v: Float[Tensor, " d"], u: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
    """The gradient of v . y, summed over positions, by u; zero where y does not depend on it."""
    if not y.requires_grad:
        return torch.zeros_like(u)
    (gradient,) = torch.autograd.grad((y.float() @ v).sum(), u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if gradient is None else gradient


def _quantities(
    target: Float[Tensor, "p s d"], own: Float[Tensor, "p s d"], turn: Float[Tensor, "d d"], row: Int[np.ndarray, " s"]
) -> Float[np.ndarray, "s q"]:
    """Per position: 1, |J|^2, |J'|^2, <J, J'>, <J, J'> with J' turned, and of another position of its row; the cosines."""
    other = np.arange(len(row))
    for own_row in np.unique(row):
        other[row == own_row] = np.roll(other[row == own_row], 1)
    turned, elsewhere = own @ turn, own[:, torch.from_numpy(other).to(own.device)]
    squares = [(one.double() ** 2).sum((0, 2)) for one in (target, own, elsewhere)]
    products = [(target.double() * one.double()).sum((0, 2)) for one in (own, turned, elsewhere)]
    sizes = [squares[1], squares[1], squares[2]]
    cosines = [product / (squares[0] * size).sqrt().clamp_min(1e-30) for product, size in zip(products, sizes, strict=True)]
    return torch.stack([torch.ones_like(squares[0]), squares[0], squares[1], *products, *cosines], 1).cpu().numpy()
