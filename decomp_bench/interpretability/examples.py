"""Positions at which a component is judged: active ones of every strength, random inactive ones, and near misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from decomp_bench.interpretability.harvest import Text

NEIGHBOURS = (1, -1, 2, -2)
"""Where a near miss is looked for, if the active position's token is nowhere inactive."""
TRIES = 20
"""Draws for each inactive position before it is given up."""


@dataclass(frozen=True)
class Examples:
    """Positions: active ones with the band of size that each is of (0: the smallest), random inactive ones, and near misses."""

    active: Int[np.ndarray, " n"]
    band: Int[np.ndarray, " n"]
    random: Int[np.ndarray, " r"]
    near: Int[np.ndarray, " h"]

    @property
    def inactive(self) -> Int[np.ndarray, " i"]:
        """All inactive positions."""
        return np.concatenate([self.random, self.near])

    @property
    def at(self) -> Int[np.ndarray, " all"]:
        """Active positions, then inactive ones."""
        return np.concatenate([self.active, self.inactive])

    @property
    def labels(self) -> Bool[np.ndarray, " all"]:
        """Which of `at` are active."""
        return np.arange(len(self.at)) < len(self.active)


def banded(size: Float[np.ndarray, " P"], bands: int) -> list[Int[np.ndarray, " n"]]:
    """The active positions in bands of equally many, smallest sizes first."""
    active = np.flatnonzero(size > 0)
    return np.array_split(active[np.argsort(size[active], kind="stable")], bands)


def some(at: Int[np.ndarray, " n"], count: int, generator: np.random.Generator) -> Int[np.ndarray, " m"]:
    """At most this many of some positions, at random, none twice."""
    return generator.permutation(at)[:count]


def draw(text: Text, size: Float[np.ndarray, " P"], count: int, bands: int, generator: np.random.Generator) -> Examples:
    """At most `count` active positions, as many of each band, and as many inactive ones: half at random, half near misses."""
    chosen = [some(band, max(1, count // bands), generator) for band in banded(size, bands)]
    active = np.concatenate(chosen)
    band = np.repeat(np.arange(bands), [len(one) for one in chosen])
    random = some(np.flatnonzero(size == 0), (len(active) + 1) // 2, generator)
    return Examples(active, band, random, near_misses(text, size, some(active, len(active) // 2, generator), generator))


def near_misses(
    text: Text, size: Float[np.ndarray, " P"], active: Int[np.ndarray, " n"], generator: np.random.Generator
) -> Int[np.ndarray, " h"]:
    """For each active position an inactive one of the same token, or else beside it; fewer where there are none."""
    found: list[int] = []
    for at, token in zip(active, text.around(active, 0), strict=True):
        same = text.by_token[int(token)]
        same = same[size[same] == 0]
        if len(same):
            found.append(int(generator.choice(same)))
            continue
        beside = [int(text.near(np.array([at]), step)[0]) for step in NEIGHBOURS]
        found += [other for other in beside if other >= 0 and size[other] == 0][:1]
    return np.array(found, np.int64)


def silent(text: Text, size: Float[np.ndarray, " P"], at: Int[np.ndarray, " n"], before: int, after: int) -> Bool[np.ndarray, " n"]:
    """At which positions nothing of the window around them is active."""
    quiet = np.ones(len(at), bool)
    for step in range(-before, after + 1):
        other = text.near(at, step)
        quiet &= (other < 0) | (size[other] == 0)
    return quiet


def silent_ones(
    text: Text,
    size: Float[np.ndarray, " P"],
    pool: Int[np.ndarray, " n"],
    count: int,
    window: Sequence[int],
    generator: np.random.Generator,
) -> Int[np.ndarray, " m"]:
    """At most this many positions of a pool, at random, in whose window (positions before, after) the component is active nowhere."""
    tried = some(pool, TRIES * count, generator)
    return tried[silent(text, size, tried, window[0], window[1])][:count]
