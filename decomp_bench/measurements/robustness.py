"""Robustness of a decomposition to letting through what it calls inactive, and how well its components sum to the weights.

KL and rise of cross-entropy under the gates themselves, rounded, with everything on, with stochastic, random and constant sources, and
with sources that an adversary found; the aggregation test, in which components that other positions need are turned on too; and the
relative error of the summed components of each matrix. Tests are those of SPD and VPD (Bushnaq et al. 2025, 2026), on any codes. Where
opening what is closed changes nothing by construction, the tests are trivial and say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from decomp_bench.bootstrap import resampled, spread
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.results import condition
from decomp_bench.robustness import Donors, Held, RobustnessConfig, Tally, climbed, held, is_trivial, joined, named_masks, soft, sourced

VERSION = 1
_WHOLE = "any complete set of components, random ones included"
METRICS = (
    Measured("robustness_kl", "KL under other masks", "nats/token", "lower", "KL(target || masked), masks g + (1 - g) r of clean gates g"),
    Measured("robustness_ce", "Rise of CE under other masks", "nats/token", "lower", "CE of the masked model minus that of the target"),
    Measured("robustness_mse", "Error under other masks", "", "lower", "mean squared error of a toy's masked output"),
    Measured("robustness_rise", "Harm of what others need", "nats/token", "lower", "error with more components on, minus that of gates"),
    Measured("weight_error", "Error of the summed components", "", "lower", "|W - sum of components| / |W|, Frobenius", _WHOLE),
    Measured("weight_cosine", "Cosine of the summed components", "", "higher", "<W, sum of components> / (|W| |sum|)", _WHOLE),
)
QUANTITIES = {"kl": "robustness_kl", "ce": "robustness_ce", "output_error": "robustness_mse"}
TRIVIAL = "gates close only components without strength: opening them changes nothing"
WAYS = ("component", "random signs", "random uniform", "random matched")
Tried = tuple[str, ...]
"""Test, way, and where along the test."""
ABOUT = {"protocol": "cascading", "gates": "clean", "split": "test"}


def measure(decomposer: Decomposer, source: Source, config: RobustnessConfig, progress: Progress) -> Rows:
    """Rows of every test, and of the weights."""
    decomposer = soft(decomposer)
    scored = list(held(decomposer, source, "test", config.rows, config.batch, config.seed))
    others = list(held(decomposer, source, "validation", config.donor_rows, config.batch, config.seed + 1))
    trivial, donors, tally = is_trivial(scored + others), Donors.of(others), Tally()
    total, done = len(scored) * (max(config.ascents) + 10), 0

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        progress(done, total)

    for number, one in enumerate(scored):
        tally.base(one)
        generator = torch.Generator().manual_seed(config.seed + 1000 * number)
        _masks(decomposer, one, config, tally, generator, trivial)
        tick(5)
        if not trivial:
            _adversary(decomposer, one, config, tally, generator, tick)
            _aggregation(decomposer, one, donors, config, tally)
        tick(5)
    rows = _rows(tally, config)
    if trivial:
        rows += [_trivial(test) for test in ("constant", "adversary", "aggregation")]
    return [ABOUT | row for row in (*rows, *_weights(decomposer))]


def _remainder(decomposer: Decomposer) -> bool:
    return "delta" in decomposer.swept


def _masks(decomposer: Decomposer, one: Held, config: RobustnessConfig, tally: Tally, generator: torch.Generator, trivial: bool) -> None:
    remainder = _remainder(decomposer)
    for name, mask in named_masks(config, remainder).items():
        draws = config.draws if name in ("stochastic", "random", "dropped") else 1
        for _ in range(draws):
            tally.add(decomposer, one, ("mask", "component", name), mask(one, generator), 1 / draws)
    for r in () if trivial else config.constants:
        tally.add(decomposer, one, ("constant", "component", f"{r:g}"), sourced(one, remainder, lambda *_, r=r: r))


def _adversary(decomposer: Decomposer, one: Held, config: RobustnessConfig, tally: Tally, generator: torch.Generator,
               tick: Callable[[int], None]) -> None:
    remainder, start = _remainder(decomposer), int(torch.randint(2**31, (1,), generator=generator))
    for way, blind in (("component", False), ("random signs", True)):
        before = 0
        for step, masks in climbed(decomposer, one, remainder, config, torch.Generator().manual_seed(start), blind):
            tally.add(decomposer, one, ("adversary", way, str(step)), masks)
            tick(0 if blind else step - before)
            before = step


def _aggregation(decomposer: Decomposer, one: Held, donors: Donors, config: RobustnessConfig, tally: Tally) -> None:
    """The same donors for every batch, so that the controls of all have the same numbers."""
    for count in config.donors:
        for draw in range(config.draws):
            generator = torch.Generator().manual_seed(config.seed + 100_003 * count + draw)
            needed = donors.union(count, generator)
            found = {"component": needed, "random uniform": donors.control(needed, generator, False)}
            found["random matched"] = donors.control(needed, generator, True)
            for way, extra in found.items():
                tally.add(decomposer, one, ("aggregation", way, str(count)), joined(one, extra), 1 / config.draws)


def _rows(tally: Tally, config: RobustnessConfig) -> Rows:
    values, documents = tally.arrays(lambda count: resampled(count, config.bootstrap))
    rows = []
    for ((test, way, at), quantity), value in values.items():
        if quantity not in QUANTITIES:
            continue
        about = {"condition": condition(concept="all", test=test, form="mask", way=way, at=at, over="documents")}
        rows.append({"metric": QUANTITIES[quantity], **spread(value, documents), **about})
        if test == "aggregation" and quantity in ("kl", "output_error"):
            rise = value - values[("mask", "component", "importance"), quantity]
            rows.append({"metric": "robustness_rise", **spread(rise, documents), **about})
    return rows


def _trivial(test: str) -> dict[str, Any]:
    about = {"value": math.nan, "lo": None, "hi": None, "n": 0, "applicable": "trivial", "reason": TRIVIAL}
    return {"metric": "robustness_kl", "condition": condition(test=test), **about}


@torch.no_grad()
def _weights(decomposer: Decomposer) -> Iterator[dict[str, Any]]:
    """How far the components of each matrix sum to it; pooled over all matrices as `all`."""
    pooled = np.zeros(4)
    for site in decomposer.sites:
        slot = site.slots[0]
        pair = decomposer.directions(site, slot) if slot.read == slot.write and slot.read in decomposer.target.map_paths else None
        if pair is None:
            continue
        whole, found = decomposer.target.weight(slot.read).double(), (pair[1].double().T @ pair[0].double()).detach()
        products = ((whole - found).square(), whole.square(), whole * found, found.square())
        sums = np.array([float(product.sum()) for product in products])
        pooled += sums
        yield from _faithful(sums, site.name, str(site.layer))
    if pooled[1]:
        yield from _faithful(pooled, "all", "all")
        return
    reason = "components are not parts of weight matrices"
    yield {"metric": "weight_error", "value": math.nan, "lo": None, "hi": None, "n": 0, "condition": "test=weights", "reason": reason}


def _faithful(sums: np.ndarray, site: str, layer: str) -> Iterator[dict[str, Any]]:
    about = {"site": site, "layer": layer, "lo": None, "hi": None, "n": 0, "condition": "test=weights"}
    yield about | {"metric": "weight_error", "value": float(np.sqrt(sums[0] / sums[1]))}
    yield about | {"metric": "weight_cosine", "value": float(sums[2] / np.sqrt(max(sums[1] * sums[3], 1e-300)))}


def _seconds(config: RobustnessConfig) -> float:
    """From the passes that are made, at 9000 tokens a second forward; a step of the adversary takes three of them."""
    masks = len(config.thresholds) + len(config.constants) + 3 + 3 * config.draws + 2 * len(config.ascents)
    passes = masks + 3 * max(config.ascents) + 3 * config.draws * len(config.donors)
    return 5 + passes * config.rows * 256 / 9000


MEASUREMENT = Measurement(VERSION, RobustnessConfig, measure, METRICS, _seconds)
