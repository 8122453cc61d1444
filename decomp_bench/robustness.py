"""Whether what a decomposition calls inactive can be let through: outputs under masks between the gates and one, drawn, fixed or attacked.

With g the gates of the clean pass, a mask is g + (1 - g) r: r says how much of what the gates hold back comes through after all. The dense
remainder of the weights, where a method has one, comes through by r too under constant, stochastic and adversarial sources, as in the
training of parameter decompositions (SPD, VPD); everywhere else it is off. Masks are the same whatever the method, through the codes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from decomp_bench.config import Config
from decomp_bench.data.sources import Source
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Batch, Codes, Decomposer
from decomp_bench.metrics.observe import Scored, base_sums, behaviour_sums, log_probabilities
from decomp_bench.replacement import clean_codes, clean_points

Share = Annotated[float, Field(ge=0, le=1)]
BINS = 10
"""Groups of components of like frequency that matched controls are drawn within."""


class RobustnessConfig(Config):
    """Which masks are tried, and on what."""

    rows: PositiveInt = 64
    """Random rows of the test split that are scored."""
    batch: PositiveInt = 16
    """Rows that share an adversary's sources."""
    thresholds: tuple[Share, ...] = (0.0, 0.1, 0.5)
    """Gates above it become one, the others zero."""
    constants: tuple[Share, ...] = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    ascents: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (20, 40, 80, 160, 320)
    """Steps after which an adversary is scored."""
    rate: PositiveFloat = 0.1
    """Size of its steps by the gradient's sign."""
    donors: tuple[PositiveInt, ...] = (1, 8, 16, 64)
    """Numbers of other positions whose active components are turned on as well."""
    donor_rows: PositiveInt = 64
    """Random rows of the validation split that donors and frequencies come from."""
    draws: PositiveInt = 3
    """Draws of random masks and of donors, whose mean counts."""
    bootstrap: PositiveInt = 1000
    seed: int = 0


Masks = dict[str, tuple[Tensor, Tensor | None]]
"""Site -> its mask, and the gate of the remainder (None: off)."""


@dataclass
class Held:
    """A batch that every mask meets, and its gates g."""

    batch: Batch
    scored: Scored
    codes: Codes

    def given(self, masks: Masks) -> Codes:
        """Codes with these masks as gates."""
        return {name: replace(self.codes[name], gate=mask, delta=delta) for name, (mask, delta) in masks.items()}


def soft(decomposer: Decomposer) -> Decomposer:
    """The decomposition with gates as they are, where they can be more than on or off."""
    return decomposer.at(mask="soft") if "mask" in decomposer.swept else decomposer


@torch.no_grad()
def held(decomposer: Decomposer, source: Source, split: str, rows: int, size: int, seed: int) -> Iterator[Held]:
    """Random rows of a split with the gates of their clean pass, in batches."""
    whole = source.size(split)
    index = np.sort(np.random.default_rng([seed, len(split)]).choice(whole, min(rows, whole), replace=False))
    for start in range(0, len(index), size):
        batch = with_clean(source, source.batch(split, index[start : start + size]), clean_points(decomposer))
        yield Held(batch, Scored.of(batch, source.target.is_lm), clean_codes(decomposer, batch))


def kept(one: Held) -> Bool[Tensor, "*rows"]:
    """The positions whose codes count: real, and not a kept first one."""
    found = positions(one.batch, one.scored.next_kept is not None)
    return found[:, 1:] if one.scored.next_kept is not None else found


def is_trivial(held: list[Held]) -> bool:
    """Whether opening what is closed changes nothing by construction: gates are zero or one, and what they close has no strength."""
    codes = [value for one in held for value in one.codes.values()]
    return all(bool(((c.gate == 0) | (c.gate == 1)).all()) and not bool((c.strength * (c.gate == 0)).any()) for c in codes)


# ---- masks


def sourced(one: Held, remainder: bool, source: Callable[[str, Tensor], Tensor | float]) -> Masks:
    """g + (1 - g) r, and the remainder by r, with the sources [*rows, n + 1] or one number for all."""
    masks: Masks = {}
    for name, codes in one.codes.items():
        r = source(name, codes.gate)
        r = r if isinstance(r, Tensor) else codes.gate.new_full((codes.gate.shape[-1] + 1,), r)
        own, rest = r[..., :-1], r[..., -1].expand(codes.gate.shape[:-1])
        masks[name] = (codes.gate + (1 - codes.gate) * own, rest if remainder else None)
    return masks


def plain(one: Held, mask: Callable[[Tensor], Tensor]) -> Masks:
    """Masks that are a function of the gates alone, without the remainder."""
    return {name: (mask(codes.gate), None) for name, codes in one.codes.items()}


def uniform(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers from a generator on the CPU, the same on every device."""
    return torch.rand(shape, generator=generator).to(like.device)


def named_masks(config: RobustnessConfig, remainder: bool) -> dict[str, Callable[[Held, torch.Generator], Masks]]:
    """The masks that need no search, by name.

    `dropped` closes a random half of what is open: what a mask that does harm looks like, beside those that only let more through.
    """
    found: dict[str, Callable[[Held, torch.Generator], Masks]] = {
        "importance": lambda one, _: plain(one, lambda g: g),
        "unmasked": lambda one, _: plain(one, torch.ones_like),
        "zero": lambda one, _: plain(one, torch.zeros_like),
        "stochastic": lambda one, generator: sourced(
            one, remainder, lambda _, g: uniform((*g.shape[:-1], g.shape[-1] + 1), g, generator)
        ),
        "random": lambda one, generator: plain(one, lambda g: uniform(g.shape, g, generator)),
        "dropped": lambda one, generator: plain(one, lambda g: g * (uniform(g.shape, g, generator) < 0.5)),
    }
    for threshold in config.thresholds:
        found[f"rounded above {threshold:g}"] = lambda one, _, t=threshold: plain(one, lambda g: (g > t).to(g.dtype))
    return found


# ---- an adversary


def mean_error(decomposer: Decomposer, one: Held, masks: Masks) -> Float[Tensor, ""]:
    """KL(target || masked) per scored token, or the mean squared error of a toy, with gradients."""
    logits = decomposer.replaced(one.batch, gates=one.given(masks)).logits
    if one.scored.clean_logp is None:
        assert one.batch.logits is not None
        return (logits - one.batch.logits).square().mean()
    assert one.scored.next_kept is not None
    kl = (one.scored.clean_p * (one.scored.clean_logp - log_probabilities(logits))).sum(-1)
    return (kl * one.scored.next_kept).sum() / one.scored.next_kept.sum()


def climbed(decomposer: Decomposer, one: Held, remainder: bool, config: RobustnessConfig, generator: torch.Generator, blind: bool
            ) -> Iterator[tuple[int, Masks]]:
    """Masks after each number of ascents: sources shared by all positions of the batch, from uniform ones, that climb by the sign of the
    gradient of the error; `blind`: by random signs, which moves them as far."""
    sources = {name: uniform((codes.gate.shape[-1] + 1,), codes.gate, generator) for name, codes in one.codes.items()}
    for step in range(1, max(config.ascents) + 1):
        if blind:
            gradients = [uniform(r.shape, r, generator) - 0.5 for r in sources.values()]
        else:
            with torch.enable_grad():
                leaves = {name: r.detach().requires_grad_() for name, r in sources.items()}
                error = mean_error(decomposer, one, sourced(one, remainder, lambda name, _, leaves=leaves: leaves[name]))
                gradients = torch.autograd.grad(error, list(leaves.values()))
        moved = zip(sources.items(), gradients, strict=True)
        sources = {name: (r + config.rate * gradient.sign()).clamp(0, 1) for (name, r), gradient in moved}
        if step in config.ascents:
            yield step, sourced(one, remainder, lambda name, _, sources=sources: sources[name])


# ---- components that other positions need


@dataclass(frozen=True)
class Donors:
    """Which components are active at positions of other text, by site."""

    active: dict[str, Bool[Tensor, "positions n"]]

    @staticmethod
    def of(found: list[Held]) -> Donors:
        """From held rows."""
        names = found[0].codes
        return Donors({name: torch.cat([one.codes[name].active[kept(one)] for one in found]).cpu() for name in names})

    def union(self, count: int, generator: torch.Generator) -> dict[str, Bool[Tensor, " n"]]:
        """What some random positions need together."""
        total = len(next(iter(self.active.values())))
        chosen = torch.randperm(total, generator=generator)[:count]
        return {name: active[chosen].any(0) for name, active in self.active.items()}

    def control(self, needed: dict[str, Tensor], generator: torch.Generator, matched: bool) -> dict[str, Bool[Tensor, " n"]]:
        """As many random components of each site; `matched`: as many of each group of like frequency."""
        found = {}
        for name, one in needed.items():
            frequency = self.active[name].float().mean(0)
            groups = frequency.argsort(stable=True).tensor_split(BINS) if matched else (torch.arange(len(one)),)
            found[name] = torch.zeros_like(one)
            for group in groups:
                found[name][group[torch.randperm(len(group), generator=generator)[: int(one[group].sum())]]] = True
        return found


def joined(one: Held, extra: dict[str, Tensor]) -> Masks:
    """The gates with some components fully on beside them."""
    return {name: (codes.gate.maximum(extra[name].to(codes.gate)), None) for name, codes in one.codes.items()}


# ---- scores


class Tally:
    """Sums of each document, by what was tried."""

    def __init__(self) -> None:
        self.sums: dict[tuple[tuple[str, ...], str], dict[int, float]] = {}
        self.weights: dict[str, dict[int, float]] = {}

    @torch.no_grad()
    def add(self, decomposer: Decomposer, one: Held, tried: tuple[str, ...], masks: Masks, share: float = 1.0) -> None:
        """Score masks on a batch; `share` of the mean over draws."""
        logits = decomposer.replaced(one.batch, gates=one.given(masks)).logits
        for (quantity, _), value in behaviour_sums(one.scored, logits, "all").items():
            _sum(self.sums.setdefault((tried, quantity), {}), one.batch, value * share)

    def base(self, one: Held) -> None:
        """Take in what a batch weighs, and its clean cross-entropy, once."""
        for (quantity, _), value in base_sums(one.scored).items():
            _sum(self.weights.setdefault(quantity, {}), one.batch, value)

    def arrays(self, resamples: Callable[[int], np.ndarray]) -> tuple[dict[tuple[tuple[str, ...], str], np.ndarray], int]:
        """Means a token (a row of a toy) [1 + resamples] of everything tried, `ce` as the rise over the clean one; and the documents."""
        documents = sorted(self.weights["tokens"])
        weights = resamples(len(documents))
        total = {name: weights @ np.array([one[doc] for doc in documents]) for name, one in self.weights.items()}
        found = {}
        for (tried, quantity), sums in self.sums.items():
            value = weights @ np.array([sums[doc] for doc in documents])
            value = value - total["ce_clean"] if quantity == "ce" else value
            found[tried, quantity] = value / total.get("targets", total["tokens"])
        return found, len(documents)


def _sum(into: dict[int, float], batch: Batch, value: Tensor) -> None:
    assert batch.doc is not None
    for doc, amount in zip(batch.doc.tolist(), value.tolist(), strict=True):
        into[doc] = into.get(doc, 0.0) + amount
