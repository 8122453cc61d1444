"""Intruder detection without a reader: which of five contexts is another component's, told by similarity alone (chance: one in five).

Four contexts are of one band of a component's size, the fifth is where a donor is active and the component is silent throughout. Donors
are the drawn components of nearest density, so that what is common does not give the rare away. The task is after Paulo et al. 2025 and
Chang et al. 2009, with a frozen embedder in the place of the reader.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from decomp_bench.interpretability.contexts import AFTER, BEFORE, Embedder, cosines_in_groups
from decomp_bench.interpretability.examples import banded, silent_ones, some
from decomp_bench.interpretability.harvest import Text

OWN = 4
CHANCE = 1 / (OWN + 1)
DONORS = 4
"""Components of nearest density that intruders are taken from."""


@dataclass(frozen=True)
class Tasks:
    """Positions of each task, the intruder's last; the component and the band that it is about."""

    at: Int[np.ndarray, "n five"]
    component: Int[np.ndarray, " n"]
    band: Int[np.ndarray, " n"]


def tasks(text: Text, sizes: Float[np.ndarray, "P m"], bands: int, repeats: int, seed: int) -> Tasks:
    """At most `repeats` tasks of each component [m] and band; none where a band has fewer than four positions or no donor is apart."""
    active = sizes > 0
    found: list[tuple[list[int], int, int]] = []
    for c in range(sizes.shape[1]):
        generator = np.random.default_rng([seed, c])
        donors = _donors(active, c)
        for band, own in enumerate(banded(sizes[:, c], bands)):
            for _ in range(repeats if len(own) >= OWN and len(donors) else 0):
                donor = int(generator.choice(donors))
                pool = np.flatnonzero(active[:, donor])
                apart = silent_ones(text, sizes[:, c], pool, 1, (BEFORE, AFTER), generator)
                if len(apart):
                    found.append(([*some(own, OWN, generator).tolist(), int(apart[0])], c, band))
    at = np.array([one[0] for one in found], np.int64).reshape(-1, OWN + 1)
    return Tasks(at, np.array([one[1] for one in found], np.int64), np.array([one[2] for one in found], np.int64))


def _donors(active: Bool[np.ndarray, "P m"], c: int) -> Int[np.ndarray, " donors"]:
    """The other components of nearest density by rank, that are active anywhere."""
    density = active.sum(0)
    near = np.argsort(np.abs(np.log((density + 1) / (density[c] + 1))), kind="stable")
    return near[(near != c) & (density[near] > 0)][:DONORS]


def found_out(given: Tasks, text: Text, embedder: Embedder) -> Float[np.ndarray, " n"]:
    """Of each task 1 where the intruder alone is least like the others, a share where several are, else 0."""
    size = OWN + 1
    like = cosines_in_groups(embedder(text, given.at.ravel()), size)
    mean = (like.sum(2) - 1) / OWN
    least = mean <= mean.min(1, keepdims=True) + 1e-9
    return least[:, -1] / np.maximum(1, least.sum(1))
