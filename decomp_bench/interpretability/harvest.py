"""One look at where components are active, from which every score is made: the same text, the same rule of choice, for every method.

Two folds of documents: A, where rules and explanations are made, and C, where they are scored. A component's size at a position is the
absolute value of its code, of the clean pass and at the sparsity that the run was trained at; it is active where that is above zero.
Padding and a kept first position are left out. What is held is the size of the drawn components and of as many random directions at every
position of both folds, four bytes each (16 bytes times positions of a fold times drawn components); all other codes are counted and let
go batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from decomp_bench.concepts.sample import Fold, Sample, draw
from decomp_bench.config import Config
from decomp_bench.data.sources import Source
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Batch, Decomposer, Site
from decomp_bench.replacement import clean_codes, clean_rows

LEAST = np.float32(1e-6)
"""Size of a random direction's activity at its threshold."""


class HarvestConfig(Config):
    """How much text is looked at and which components are drawn."""

    components: PositiveInt = 48
    """Components drawn of each place that a method reads and writes at, over all layers."""
    rows: PositiveInt = 320
    """Rows of text of each fold."""
    fewest: PositiveInt = 24
    """Positions of each fold at which a component must be active to be drawn."""
    densest: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Components that are active at a larger share of a fold's positions are not drawn."""
    batch: PositiveInt = 16
    """Rows that are encoded together; nothing depends on it."""
    seed: int = 0
    bootstrap: PositiveInt = 2000
    """Resamples of components behind every interval."""


@dataclass(frozen=True)
class Component:
    """A drawn component: its site, its number there, and the share of fold A's positions where it is active."""

    site: Site
    index: int
    density: float

    @property
    def name(self) -> str:
        return f"{self.site.name}/{self.index}"


@dataclass(frozen=True)
class Text:
    """Rows of one fold, and row and place of each of its positions in order: all but padding and a kept first one."""

    tokens: Int[np.ndarray, "R T"]
    length: Int[np.ndarray, " R"]
    document: Int[np.ndarray, " R"]
    row: Int[np.ndarray, " P"]
    place: Int[np.ndarray, " P"]

    @staticmethod
    def of(sample: Sample) -> Text:
        """The text of a sample's rows."""
        whole = sample.source.rows(sample.split)
        length = sample.length.astype(np.int64)
        tokens = whole.tokens[sample.index][:, : int(length.max())].astype(np.int64)
        first = int(sample.source.target.keeps_first)
        row, place = np.nonzero((np.arange(tokens.shape[1]) < length[:, None]) & (np.arange(tokens.shape[1]) >= first))
        return Text(tokens, length, sample.documents.astype(np.int64), row, place)

    def around(self, at: Int[np.ndarray, " n"], offset: int) -> Int[np.ndarray, " n"]:
        """The token `offset` after each position, -1 beyond its row."""
        row, place = self.row[at], self.place[at] + offset
        inside = (place >= 0) & (place < self.length[row])
        return np.where(inside, self.tokens[row, np.where(inside, place, 0)], -1)

    def near(self, at: Int[np.ndarray, " n"], offset: int) -> Int[np.ndarray, " n"]:
        """The position `offset` after each one, -1 where that is another row's."""
        other = at + offset
        inside = (other >= 0) & (other < len(self.row))
        other = np.where(inside, other, 0)
        return np.where(inside & (self.row[other] == self.row[at]), other, -1)

    @cached_property
    def by_token(self) -> dict[int, Int[np.ndarray, " n"]]:
        """Token -> the positions where it stands."""
        here = self.around(np.arange(len(self.row)), 0)
        order = np.argsort(here, kind="stable")
        values, starts = np.unique(here[order], return_index=True)
        return {int(token): at for token, at in zip(values, np.split(order, starts[1:]), strict=True)}


@dataclass(frozen=True)
class Activity:
    """Sizes of components [P, m] at the positions of both folds; column c belongs to component c."""

    fit: Float[np.ndarray, "P m"]
    held: Float[np.ndarray, "Q m"]

    def shifted(self, generator: np.random.Generator) -> Activity:
        """Every column rotated along its fold by a random distance of at least a quarter: as dense and as bursty, and about nothing."""

        def rotated(size: np.ndarray) -> np.ndarray:
            steps = generator.integers(len(size) // 4, max(len(size) // 4 + 1, 3 * len(size) // 4), size.shape[1])
            return np.stack([np.roll(column, step) for column, step in zip(size.T, steps, strict=True)], 1)

        return Activity(rotated(self.fit), rotated(self.held)) if self.fit.shape[1] else self


@dataclass(frozen=True)
class Place:
    """Drawn components of the sites that read and write at the same points of their layers, and as many random directions beside them.

    Direction c reads where component c does, and is active where its product with what is read there is above the threshold that makes it
    as dense on fold A as the component. `whole` counts the place's components, `pool` those that could have been drawn.
    """

    name: str
    components: tuple[Component, ...]
    whole: int
    pool: int
    own: Activity
    random: Activity


@dataclass(frozen=True)
class Harvest:
    """What every score is made from."""

    fit: Text
    held: Text
    places: tuple[Place, ...]


def _ends(site: Site) -> tuple[list[str], list[str]]:
    return [slot.read for slot in site.slots], [slot.write for slot in site.slots]


def place_of(site: Site) -> str:
    """Where a site's components read and write, without the layer: `mlp.up`, or `mlp.in to mlp.out`."""
    reads, writes = (dict.fromkeys(point.split(".", 1)[1] for point in points) for points in _ends(site))
    read, write = "+".join(reads), "+".join(writes)
    return read if read == write else f"{read} to {write}"


@torch.no_grad()
def harvest(decomposer: Decomposer, source: Source, config: HarvestConfig) -> Harvest:
    """Count, draw, and hold: fold A and fold C are each read twice."""
    folds: tuple[Fold, Fold] = ("A", "C")
    samples = [draw(source, fold, (), config.rows, 0, config.seed) for fold in folds]
    fit, held = (Text.of(sample) for sample in samples)
    counts = [_counts(decomposer, sample, config.batch) for sample in samples]
    sizes = (len(fit.row), len(held.row))
    grouped: dict[str, list[Site]] = {}
    for site in decomposer.sites:
        grouped.setdefault(place_of(site), []).append(site)
    drawn = {name: _drawn(sites, counts, sizes, config) for name, sites in grouped.items()}
    chosen = [component for components, _ in drawn.values() for component in components]
    directions = _directions(decomposer, chosen, config.seed)
    (own_fit, random_fit), (own_held, random_held) = (_held(decomposer, sample, chosen, directions, config.batch) for sample in samples)
    random_fit, random_held = _as_dense(random_fit, random_held, own_fit)
    places, start = [], 0
    for name, (components, pool) in drawn.items():
        part = slice(start, start + len(components))
        own, random = Activity(own_fit[:, part], own_held[:, part]), Activity(random_fit[:, part], random_held[:, part])
        places.append(Place(name, components, sum(site.n for site in grouped[name]), pool, own, random))
        start = part.stop
    return Harvest(fit, held, tuple(places))


def _batches(decomposer: Decomposer, sample: Sample, size: int) -> Iterator[tuple[Batch, Bool[Tensor, "B T"]]]:
    """Batches with their clean activations, and which of the encoded positions count."""
    for start in range(0, len(sample.index), size):
        batch = with_clean(sample.source, sample.source.batch(sample.split, sample.index[start : start + size]), decomposer.points(), False)
        yield batch, clean_rows(decomposer, positions(batch, decomposer.target.keeps_first))


def _counts(decomposer: Decomposer, sample: Sample, size: int) -> dict[str, Int[np.ndarray, " n"]]:
    """Of every component, at how many positions it is active."""
    found = {site.name: torch.zeros(site.n, dtype=torch.int64) for site in decomposer.sites}
    for batch, kept in _batches(decomposer, sample, size):
        for name, codes in clean_codes(decomposer, batch).items():
            found[name] += (codes.value[kept] != 0).sum(0).cpu()
    return {name: count.numpy() for name, count in found.items()}


def _drawn(
    sites: list[Site], counts: list[dict[str, np.ndarray]], sizes: tuple[int, int], config: HarvestConfig
) -> tuple[tuple[Component, ...], int]:
    """One component at random of each of equally large strata of density, and how many could have been drawn.

    The pool is every component of the sites that is active at `fewest` positions of both folds and at no more than the share `densest`.
    """
    pool = []
    for site in sites:
        here = [fold[site.name] for fold in counts]
        fits = np.logical_and.reduce([(n >= config.fewest) & (n <= config.densest * size) for n, size in zip(here, sizes, strict=True)])
        pool += [Component(site, int(i), float(here[0][i] / sizes[0])) for i in np.flatnonzero(fits)]
    ranked = sorted(pool, key=lambda component: -component.density)
    generator = np.random.default_rng(config.seed)
    strata = np.array_split(np.arange(len(ranked)), min(config.components, len(ranked))) if ranked else []
    return tuple(ranked[int(generator.choice(stratum))] for stratum in strata), len(pool)


def _directions(decomposer: Decomposer, chosen: list[Component], seed: int) -> list[Float[Tensor, " d"]]:
    """A random direction in the space that each component's first slot reads from."""
    generator = torch.Generator().manual_seed(seed)
    device = decomposer.target.device
    return [torch.randn(decomposer.target.size(one.site.slots[0].read), generator=generator).to(device) for one in chosen]


def _held(
    decomposer: Decomposer, sample: Sample, chosen: list[Component], directions: list[Tensor], size: int
) -> tuple[Float[np.ndarray, "P m"], Float[np.ndarray, "P m"]]:
    """Sizes of the chosen components, and products of the random directions with what they read, at all positions."""
    total = int((sample.length - int(decomposer.target.keeps_first)).sum())
    own, products = np.empty((total, len(chosen)), np.float32), np.empty((total, len(chosen)), np.float32)
    columns: dict[str, list[int]] = {}
    for c, one in enumerate(chosen):
        columns.setdefault(one.site.name, []).append(c)
    banks = {name: torch.stack([directions[c] for c in own_columns], 1) for name, own_columns in columns.items()}
    done = 0
    for batch, kept in _batches(decomposer, sample, size):
        codes = clean_codes(decomposer, batch)
        part = slice(done, done + int(kept.sum()))
        for name, which in columns.items():
            index = torch.tensor([chosen[c].index for c in which], device=kept.device)
            value = (codes[name].strength[..., index] * codes[name].gate[..., index])[kept]
            own[part, which] = value.abs().float().cpu().numpy()
            read = clean_rows(decomposer, batch.clean[chosen[which[0]].site.slots[0].read])
            products[part, which] = (read[kept].float() @ banks[name]).cpu().numpy()
        done = part.stop
    return own, products


def _as_dense(fit: np.ndarray, held: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What products of random directions reach above their thresholds: at as many positions of fold A as the components are active at, and
    more where products tie at the threshold."""
    count = (own > 0).sum(0)
    least = np.array([np.partition(column, len(column) - n)[len(column) - n] for column, n in zip(fit.T, count, strict=True)])
    least = least.astype(np.float32).reshape(1, -1)
    return tuple(np.where(products >= least, products - least + LEAST, 0) for products in (fit, held))  # type: ignore[return-value]
