"""Whether a replacement MLP responds to its input as the original does: their Jacobians at sampled positions, or rows of a toy.

Protocol. At a position of held-out text, J is the derivative of the layer's MLP output by the MLP's input there, both clean; J' is that of
what replaces it. Held constant: every other input (what sources at other layers read, other positions), and the gates, at those of the
clean pass. With gates that are on or off this is the derivative almost everywhere; of graded gates it leaves out the part through the
gate. Both are met with the same orthonormal vectors v: v^T J and v^T J', all d of them where the width is no larger than `probes`, so that
sums over v are the Frobenius norms and products themselves, and estimates of them up to a common factor otherwise. Positions at which J is
zero, as where all of a toy's neurons are off, are left out: nothing has a direction there; so are a toy's rows without input, at which no
component has anything to let through. A toy's rows are documents of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """Positions of each row at most; a toy, whose rows have one, is met with so many times more rows."""
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


@dataclass(frozen=True)
class Places:
    """Where a batch is differentiated: indices into its rows (and positions), which of them are each other's control, their documents."""

    batch: Batch
    at: tuple[Int[np.ndarray, " s"], ...]
    together: Int[np.ndarray, " s"]
    document: Int[np.ndarray, " s"]


def sums(decomposer: Decomposer, source: Source, config: JacobianConfig, tick: Callable[[], None]) -> Sums:
    """Compare at every sampled position of fold C, or row of a toy; `tick` is called once for each batch of rows and layer."""
    target, layers = decomposer.target, layers_of(decomposer)
    places = list(_places_of_text(source, config) if target.is_lm else _places_of_toy(source, config))
    found = {layer: np.zeros((1 + max(int(one.document.max()) for one in places), len(QUANTITIES))) for layer in layers}
    bases: dict[tuple[int, ...], list[Tensor]] = {}
    for one in places:
        clean = with_clean(source, one.batch, clean_points(decomposer), logits=False)
        for layer in layers:
            sizes = tuple(clean.clean[f"{layer}.mlp.{end}"].shape[-1] for end in ("out", "in"))
            if sizes not in bases:
                generator = torch.Generator().manual_seed(config.seed)
                bases[sizes] = [_orthonormal(size, generator).to(target.device) for size in sizes]
            probes, turn = bases[sizes]
            pair = jacobians(decomposer, clean, layer, one.at, probes[: config.probes])
            np.add.at(found[layer], one.document, _quantities(*pair, turn, one.together))
            tick()
    return Sums(found)


def _places_of_text(source: Source, config: JacobianConfig) -> Iterator[Places]:
    sample = draw(source, "C", (), config.rows, 0, config.seed)
    _, document = np.unique(sample.documents, return_inverse=True)
    for start in range(0, len(sample.index), config.batch):
        part = slice(start, min(start + config.batch, len(sample.index)))
        row, place = _places(sample, part, config)
        yield Places(source.batch(sample.split, sample.index[part]), (row, place), row, document[part][row])


def _places_of_toy(source: Source, config: JacobianConfig) -> Iterator[Places]:
    size = config.batch * config.positions
    index = np.random.default_rng(config.seed).permutation(source.size("test"))
    inputs = source.batch("test", index).x
    assert inputs is not None
    index = index[(inputs != 0).any(1).cpu().numpy()][: config.rows * config.positions]
    for start in range(0, len(index), size):
        part = index[start : start + size]
        row = np.arange(len(part))
        yield Places(source.batch("test", part), (row,), np.zeros_like(row), start + row)


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
    decomposer: Decomposer, batch: Batch, layer: int, at: tuple[np.ndarray, ...], probes: Float[Tensor, "p d_out"]
) -> tuple[Float[Tensor, "p s d_in"], Float[Tensor, "p s d_in"]]:
    """v^T J of the target's MLP and v^T J' of its replacement, for each probe v, at rows [s], or rows [s] and positions [s] of text."""
    target, first, point = decomposer.target, int(decomposer.target.keeps_first), f"{layer}.mlp.in"
    with torch.no_grad():
        codes = clean_codes(decomposer, batch)
    u = batch.clean[point].detach().float().requires_grad_()
    here = Batch(batch.x, batch.length, batch.doc, {**batch.clean, point: u})

    def through(_x: Tensor) -> Tensor:
        return target.part(f"{layer}.mlp")(u)

    where = tuple(torch.from_numpy(part).to(u.device) for part in at)
    kept = (where[0], where[1] - first) if first and len(where) > 1 else where
    with torch.enable_grad():
        own = replaced(decomposer, here, (layer,), "single", codes, forward=through).outputs[layer]
        original = target.part(f"{layer}.mlp")(u)
        outputs = (original[where], own[kept])
    return tuple(torch.stack([_product(y, v, u)[where] for v in probes]) for y in outputs)  # type: ignore[return-value]


def _product(y: Float[Tensor, "s d_out"], v: Float[Tensor, " d_out"], u: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
    """The gradient of v . y, summed over positions, by u; zero where y does not depend on it."""
    if not y.requires_grad:
        return torch.zeros_like(u)
    (gradient,) = torch.autograd.grad((y.float() @ v).sum(), u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if gradient is None else gradient


def _quantities(
    target: Float[Tensor, "p s d"], own: Float[Tensor, "p s d"], turn: Float[Tensor, "d d"], together: Int[np.ndarray, " s"]
) -> Float[np.ndarray, "s q"]:
    """Per position: 1, |J|^2, |J'|^2, <J, J'>, <J, J'> with J' turned, and of another position of its own; the cosines. 0 where J is 0."""
    other = np.arange(len(together))
    for group in np.unique(together):
        other[together == group] = np.roll(other[together == group], 1)
    turned, elsewhere = own @ turn, own[:, torch.from_numpy(other).to(own.device)]
    squares = [(one.double() ** 2).sum((0, 2)) for one in (target, own, elsewhere)]
    products = [(target.double() * one.double()).sum((0, 2)) for one in (own, turned, elsewhere)]
    sizes = [squares[1], squares[1], squares[2]]
    cosines = [product / (squares[0] * size).sqrt().clamp_min(1e-30) for product, size in zip(products, sizes, strict=True)]
    found = torch.stack([torch.ones_like(squares[0]), squares[0], squares[1], *products, *cosines], 1)
    return (found * (squares[0] > 0)[:, None]).cpu().numpy()
