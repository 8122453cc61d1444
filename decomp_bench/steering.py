"""Texts generated under steering, and how much of a concept and of ordinary language they have.

Components are selected on fold A, the factor is chosen on fold B, and fold C scores; a detector made from fold D says how much of the
concept a text has. Every method and every baseline gets the same prompts, draws, factors and selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from decomp_bench import directions
from decomp_bench.concepts import Concept
from decomp_bench.concepts.detectors import Detector, detectors
from decomp_bench.concepts.sample import SPLIT, Fold, Sample, draw, fold_rows, spread_over_documents
from decomp_bench.config import Config
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.errors import UserError
from decomp_bench.fluency import Natural, fluency, harmonic
from decomp_bench.generation import continuation_nll, generate, is_positionwise
from decomp_bench.intervene import Intervention, matched
from decomp_bench.replacement import clean_points
from decomp_bench.targets.base import TargetModel

NATURAL_TEXTS = 256
FOLDS: tuple[Fold, Fold] = ("B", "C")


class SteeringConfig(Config):
    """What is steered, how strongly, and what it is measured on."""

    concepts: tuple[str, ...] = ()
    """Names of concepts; none: all that the data set has."""
    factors: tuple[PositiveFloat, ...] = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Changes |dy| / |y| of the MLP outputs."""
    prompts: PositiveInt = 24
    """Prompts of each of the folds B and C, from as many documents as there are."""
    prompt_tokens: PositiveInt = 8
    length: PositiveInt = 40
    """Generated tokens."""
    prefixes: tuple[PositiveInt, ...] = (8, 24)
    """Tokens of a text of the concept that the prompt baseline begins with."""
    temperature: NonNegativeFloat = 0.7
    general: PositiveInt = 96
    positive: PositiveInt = 16
    """Random rows of folds A and D, and rows more of each topic."""
    controls: PositiveInt = 5
    """Random components, or directions, whose mean is the control."""
    detector: NonNegativeFloat = 0.9
    """AUROC on held-out texts below which a concept's detector is not trusted, and the concept left out."""
    reft_steps: NonNegativeInt = 60
    bootstrap: PositiveInt = 1000
    seed: int = 0


@dataclass(frozen=True)
class Prompts:
    """Prompts of folds B and C, and what the untouched model makes of them."""

    tokens: Int[Tensor, "n start"]
    fold: np.ndarray
    """The fold of each prompt [n]."""
    unsteered: Int[Tensor, "n length"]
    nll: np.ndarray
    natural: dict[Fold, Natural]


@dataclass(frozen=True)
class Ground:
    """What every way to steer meets alike: texts that select, prompts, and detectors."""

    config: SteeringConfig
    untouched: Decomposer
    """A decomposition into nothing, which generates and reads as the target does."""
    sample: Sample
    prompts: Prompts
    detectors: list[Detector]

    @property
    def scored(self) -> np.ndarray:
        """Which prompts [n] are of fold C."""
        return self.prompts.fold == "C"


@dataclass(frozen=True)
class Texts:
    """Scores in [0, 1] of the texts [n] of every prompt: concept, fluency, and their harmonic mean."""

    concept: np.ndarray
    fluency: np.ndarray
    score: np.ndarray


Outcome = dict[float, Texts]
"""Factor -> texts; empty where no strength could be set."""


def nothing(target: TargetModel) -> Decomposer:
    """A decomposition without components."""
    return directions.Directions.of(target, {}, {})


def ground(source: Source, config: SteeringConfig, concepts: Sequence[Concept]) -> Ground:
    """Draw texts, make prompts and detectors. Raises UserError where a fold has too few rows."""
    untouched = nothing(source.target)
    sample = draw(source, "A", concepts, config.general, config.positive, config.seed)
    made = detectors(draw(source, "D", concepts, 2 * config.general, 2 * config.positive, config.seed), config.length)
    return Ground(config, untouched, sample, prompts(untouched, source, config), made)


def prompts(untouched: Decomposer, source: Source, config: SteeringConfig) -> Prompts:
    """Beginnings of documents' rows of folds B and C, long enough that natural text of the generated length follows."""
    parts, natural, folds = [], {}, []
    for fold in FOLDS:
        text = _natural(source, fold, config)
        start, follows = text[:, : config.prompt_tokens], text[:, config.prompt_tokens :]
        natural[fold] = Natural.of(continuation_nll(untouched, start, follows).cpu().numpy(), follows.cpu().numpy())
        parts.append(start[: config.prompts])
        folds += [fold] * len(parts[-1])
    chosen = torch.cat(parts)
    plain = generate(untouched, chosen, config.length, None, config.temperature, config.seed, cached=True)
    return Prompts(chosen, np.array(folds), plain, continuation_nll(untouched, chosen, plain).cpu().numpy(), natural)


def _natural(source: Source, fold: Fold, config: SteeringConfig) -> Int[Tensor, "rows whole"]:
    rows = source.rows(SPLIT[fold])
    whole = config.prompt_tokens + config.length
    pool = [int(i) for i in np.random.default_rng(config.seed).permutation(fold_rows(source, fold)) if rows.length[i] >= whole]
    pool = spread_over_documents(pool, rows.doc)
    if len(pool) < 2:
        raise UserError(f"the {SPLIT[fold]} split has fewer than two rows of {whole} tokens: make prompts and length shorter")
    return torch.from_numpy(rows.tokens[pool[:NATURAL_TEXTS], :whole].astype(np.int64)).to(source.target.device)


def reference(decomposer: Decomposer, sample: Sample, rows: int = 6) -> Batch:
    """A few rows of fold A with clean activations: where strengths are measured."""
    batch = sample.source.batch(sample.split, sample.index[:: max(1, len(sample.index) // rows)][:rows]).to(decomposer.target.device)
    assert batch.x is not None
    batch.clean, _ = decomposer.target.clean(batch.x, clean_points(decomposer), logits=False)
    return batch


def steered(decomposer: Decomposer, intervention: Intervention, met: Ground, c: int, done: Callable[[], object] = lambda: None) -> Outcome:
    """Texts of concept `c` at every factor that some amount of the intervention reaches."""
    config, found = met.config, {}
    batch = reference(decomposer, met.sample)
    cached = is_positionwise(decomposer, met.prompts.tokens)
    start, before = 1.0, math.nan
    for factor in config.factors:
        set_to = matched(decomposer, batch, intervention, factor, start if math.isnan(before) else start * factor / before)
        if set_to is not None:
            start, before = float(set_to.amount), factor
            text = generate(decomposer, met.prompts.tokens, config.length, set_to, config.temperature, config.seed, cached)
            found[factor] = scored(met, c, text)
        done()
    return found


def prompted(met: Ground, c: int) -> Outcome:
    """The prompt baseline: the beginning of a text of the concept from fold A stands before the prompt. Scored as if it did not. Its
    factors are numbers of tokens; empty where the fold has no text of the concept."""
    config, sample, tokens = met.config, met.sample, met.prompts.tokens
    share = sample.tokens[..., c].sum(1) / torch.from_numpy(sample.length - 1)
    rows = share.argsort(descending=True, stable=True)[: len(tokens)]
    usable = [int(i) for i in rows if share[i] > 0 and sample.length[i] > max(config.prefixes)]
    found = {}
    for width in config.prefixes if usable else ():
        kept = torch.from_numpy(sample.source.rows(sample.split).tokens[sample.index[usable]][:, 1 : 1 + width].astype(np.int64))
        prefix = kept[torch.arange(len(tokens)) % len(kept)].to(tokens.device)
        longer = torch.cat([tokens[:, :1], prefix, tokens[:, 1:]], 1)
        text = generate(met.untouched, longer, config.length, None, config.temperature, config.seed, cached=True)
        found[float(width)] = scored(met, c, text)
    return found


def unsteered(met: Ground, c: int) -> Texts:
    """What the untouched model's own texts score."""
    return scored(met, c, met.prompts.unsteered)


def scored(met: Ground, c: int, text: Int[Tensor, "n length"]) -> Texts:
    """How much more of the concept texts have than the untouched model's have on average, and their fluency; fold by fold."""
    had, detector = met.prompts, met.detectors[c]
    nll, tokens = continuation_nll(met.untouched, had.tokens, text).cpu().numpy(), text.cpu().numpy()
    detected, base = (detector.score([met.sample.pieces.text(ids) for ids in of.tolist()]) for of in (text, had.unsteered))
    concept, smooth = np.empty(len(nll)), np.empty(len(nll))
    for fold in FOLDS:
        own = had.fold == fold
        concept[own] = np.clip(detected[own] - base[own].mean(), 0, 1)
        smooth[own] = fluency(nll[own], had.nll[own], tokens[own], had.natural[fold])
    return Texts(concept, smooth, harmonic(concept, smooth))


def chosen(outcome: Outcome, met: Ground) -> float:
    """The factor whose texts score best on fold B; NaN where there are no factors."""
    return max(outcome, key=lambda factor: float(outcome[factor].score[~met.scored].mean()), default=math.nan)
