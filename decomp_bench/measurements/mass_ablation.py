"""Growing sets of components switched off at once: inactive ones, which should cost nothing, beside as many of any.

Start with every component fully on, without the dense remainder, and at each position switch off a random share of those whose gate is
zero there (`component`), or as many of all (`random matched`). The sets of a larger share contain those of a smaller one; at share 1 the
active components are left, all fully on. Gates come from the clean pass. To a parameter decomposition an inactive component is one that
can be ablated together with any others without harm (Bushnaq et al. 2025, 2026). Where opening what is closed changes nothing by
construction, the test is trivial.
"""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from torch import Tensor

from decomp_bench.bootstrap import resampled, spread
from decomp_bench.config import Config
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Decomposer
from decomp_bench.measurements import Measured, Measurement, Progress, Rows
from decomp_bench.results import condition
from decomp_bench.robustness import Held, Masks, Share, Tally, held, is_trivial, soft, uniform

VERSION = 1
METRICS = (
    Measured("mass_kl", "KL with components off", "nats/token", "lower", "KL(target || ablated), mean over draws"),
    Measured("mass_mse", "Error with components off", "", "lower", "mean squared error of a toy's ablated output, mean over draws"),
)
QUANTITIES = {"kl": "mass_kl", "output_error": "mass_mse"}
WAYS = ("component", "random matched")
TRIVIAL = "inactive components have no strength: switching them off changes nothing"
ABOUT = {"protocol": "cascading", "gates": "clean", "split": "test"}


class MassAblationConfig(Config):
    """Which shares are switched off, and on what."""

    rows: PositiveInt = 64
    """Random rows of the test split that are scored."""
    batch: PositiveInt = 16
    shares: tuple[Share, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    """Shares of the inactive components of a site that are off."""
    draws: PositiveInt = 3
    """Draws of the sets, whose mean counts."""
    bootstrap: PositiveInt = 1000
    seed: int = 0


def measure(decomposer: Decomposer, source: Source, config: MassAblationConfig, progress: Progress) -> Rows:
    """Rows of every share and way."""
    decomposer = soft(decomposer)
    scored = list(held(decomposer, source, "test", config.rows, config.batch, config.seed))
    tally, trivial = Tally(), is_trivial(scored)
    for number, one in enumerate(scored):
        tally.base(one)
        for draw in range(config.draws):
            generator = torch.Generator().manual_seed(config.seed + 1000 * number + draw)
            order = {name: uniform(codes.gate.shape, codes.gate, generator) for name, codes in one.codes.items()}
            for share in config.shares:
                for way in WAYS[1:] if trivial else WAYS:
                    tally.add(decomposer, one, (way, f"{share:g}"), ablated(one, order, share, way), 1 / config.draws)
            progress(number * config.draws + draw + 1, len(scored) * config.draws)
    return [ABOUT | row for row in _rows(tally, config, trivial)]


def ablated(one: Held, order: dict[str, Tensor], share: float, way: str) -> Masks:
    """Zeros where components are off, ones elsewhere; `order` holds uniform numbers, by whose size components go off."""
    masks: Masks = {}
    for name, codes in one.codes.items():
        inactive = codes.gate == 0
        count = (inactive.sum(-1, keepdim=True) * share).round()
        eligible = inactive if way == WAYS[0] else torch.ones_like(inactive)
        place = order[name].masked_fill(~eligible, torch.inf).argsort(-1).argsort(-1)
        masks[name] = ((place >= count).to(codes.gate.dtype), None)
    return masks


def _rows(tally: Tally, config: MassAblationConfig, trivial: bool) -> Rows:
    values, documents = tally.arrays(lambda count: resampled(count, config.bootstrap))
    rows: Rows = []
    for ((way, at), quantity), value in values.items():
        if quantity in QUANTITIES:
            about = condition(concept="all", test="mass", form="mask", way=way, at=at, over="documents")
            rows.append({"metric": QUANTITIES[quantity], **spread(value, documents), "condition": about})
    if trivial:
        missing = {"value": math.nan, "lo": None, "hi": None, "n": 0, "applicable": "trivial", "reason": TRIVIAL}
        rows.append({"metric": "mass_kl", "condition": condition(test="mass", way=WAYS[0]), **missing})
    return rows


def _seconds(config: MassAblationConfig) -> float:
    """From the passes that are made, at 9000 tokens a second forward."""
    return 3 + len(WAYS) * len(config.shares) * config.draws * config.rows * 256 / 9000


MEASUREMENT = Measurement(VERSION, MassAblationConfig, measure, METRICS, _seconds)
