"""Steering: push a concept into generated text, and measure concept and fluency at equal changes of the MLP outputs.

Components are selected on fold A, the factor is chosen on fold B, and fold C scores; a detector made from fold D says how much of the
concept a text has. Every method and every baseline gets the same prompts, draws, factors and selection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from decomp_bench import directions
from decomp_bench.auroc import auroc
from decomp_bench.bootstrap import resampled
from decomp_bench.concepts import Concept, concepts_of
from decomp_bench.concepts.detectors import Detector, detectors
from decomp_bench.concepts.sample import SPLIT, Fold, Sample, draw, fold_rows, spread_over_documents
from decomp_bench.config import Config
from decomp_bench.contenders import Contender, forms, interval, tidy
from decomp_bench.data.sources import Source
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.errors import UserError
from decomp_bench.fluency import Natural, fluency, harmonic, variety
from decomp_bench.generation import continuation_nll, generate, is_positionwise
from decomp_bench.intervene import Intervention, matched, one
from decomp_bench.replacement import clean_points
from decomp_bench.selection import Found, Scores, best, components, controls, scores

if TYPE_CHECKING:
    import pandas as pd

NATURAL_TEXTS = 256


class SteeringConfig(Config):
    """What is steered, how strongly, and what it is measured on."""

    concepts: tuple[str, ...] = ()
    """Names of concepts; none: all that the data set has."""
    factors: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
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
    reft_steps: NonNegativeInt = 60
    bootstrap: PositiveInt = 1000
    seed: int = 0


@dataclass(frozen=True)
class Steerer:
    """One way to steer to a concept, before its strength is set."""

    method: str
    run: str
    form: str
    decomposer: Decomposer
    intervention: Intervention
    site: str
    component: int
    auroc: float


@dataclass(frozen=True)
class Prompts:
    """Prompts of a fold, and what the untouched model makes of them."""

    fold: Fold
    tokens: Int[Tensor, "n start"]
    unsteered: Int[Tensor, "n length"]
    nll: np.ndarray
    natural: Natural


def steer(
    contenders: Sequence[Contender],
    source: Source,
    config: SteeringConfig,
    concepts: Sequence[Concept] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Tidy rows (see `contenders.COLUMNS`) of every concept, method, factor and fold; concepts are those of the config unless given."""
    if not contenders:
        raise UserError("steering needs at least one run: name trained runs")
    concepts = concepts_of(source.name, config.concepts) if concepts is None else concepts
    sample = draw(source, "A", concepts, config.general, config.positive, config.seed)
    judges = detectors(draw(source, "D", concepts, 2 * config.general, 2 * config.positive, config.seed), config.length)
    found = [scores(one_of.decomposer, sample) for one_of in contenders]
    layers = sorted({layer for one_of in contenders for layer in one_of.decomposer.layers})
    fitted = directions.outputs(sample, layers)
    judge = contenders[0].decomposer
    folds = [prompts(judge, source, fold, config) for fold in ("B", "C")]
    rows: list[dict[str, Any]] = []
    for c, concept in enumerate(concepts):
        about = {"concept": concept.name, "kind": concept.kind}
        rows.append(about | {"method": "detector", "metric": "auroc", "value": judges[c].auroc, "n": judges[c].texts, "split": "D"})
        ways = [*_component_steerers(contenders, found, c, config.seed), *_direction_steerers(judge, sample, fitted, c, config)]
        for way in ways:
            rows += [about | row for row in _steered(way, sample, folds, judges[c], config)]
        rows += [about | row for row in _prompted(judge, sample, c, folds, judges[c], config)]
        if progress:
            progress({"concept": concept.name, "done": c + 1, "concepts": len(concepts)})
    return tidy(rows)


def frontier(frame: pd.DataFrame) -> pd.DataFrame:
    """For each method, form and factor on fold C the mean over concepts of concept, fluency and score: what a frontier is drawn from."""
    wanted = frame[(frame["split"] == "C") & frame["metric"].isin(["concept", "fluency", "score"])]
    return wanted.pivot_table(index=["method", "run", "form", "factor"], columns="metric", values="value", aggfunc="mean").reset_index()


def prompts(judge: Decomposer, source: Source, fold: Fold, config: SteeringConfig) -> Prompts:
    """Beginnings of documents' rows of a fold, long enough that natural text of the generated length follows."""
    rows = source.rows(SPLIT[fold])
    whole = config.prompt_tokens + config.length
    pool = [int(i) for i in np.random.default_rng(config.seed).permutation(fold_rows(source, fold)) if rows.length[i] >= whole]
    pool = spread_over_documents(pool, rows.doc)
    if len(pool) < 2:
        raise UserError(f"the {SPLIT[fold]} split has fewer than two rows of {whole} tokens: make prompts and length shorter")
    text = torch.from_numpy(rows.tokens[pool[:NATURAL_TEXTS], :whole].astype(np.int64)).to(source.target.device)
    start, follows = text[:, : config.prompt_tokens], text[:, config.prompt_tokens :]
    natural = Natural.of(continuation_nll(judge, start, follows).cpu().numpy(), follows.cpu().numpy())
    chosen = start[: config.prompts]
    plain = generate(judge, chosen, config.length, None, config.temperature, _draws(config, fold), cached=True)
    return Prompts(fold, chosen, plain, continuation_nll(judge, chosen, plain).cpu().numpy(), natural)


def _draws(config: SteeringConfig, fold: Fold) -> int:
    return 1000 * config.seed + ord(fold)


def _component_steerers(contenders: Sequence[Contender], found: Sequence[Scores], c: int, seed: int) -> Iterator[Steerer]:
    """The best component of each run in each of its forms, and a random one of its site that is as often active."""
    for contender, score in zip(contenders, found, strict=True):
        for form in forms(contender.decomposer):
            chosen = best(score, c, 1, form.sites)
            random = controls(score, chosen, c, np.random.default_rng([seed, c]))
            for label, picked in ((form.name, chosen), (f"{form.name}, random component", random)):
                for component in picked:
                    yield _steerer(contender, label, form.kind, component, form.source_only)


def _steerer(contender: Contender, form: str, kind: Any, found: Found, source_only: bool) -> Steerer:
    layer = next(site.layer for site in contender.decomposer.sites if site.name == found.site)
    intervention = Intervention(kind, components([found]), layers=(layer,) if source_only else None)
    return Steerer(contender.name, contender.run, form, contender.decomposer, intervention, found.site, found.component, found.auroc)


def _direction_steerers(judge: Decomposer, sample: Sample, fitted: tuple, c: int, config: SteeringConfig) -> Iterator[Steerer]:
    """Difference in means, probe and fine-tuned direction at the layer where the difference in means tells best, and a random one."""
    outputs, row, held = fitted
    holds = held[:, c]
    if not 0 < int(holds.sum()) < len(holds):
        return
    layer, mean = best_layer(sample, fitted, c)
    y = outputs[layer]
    dim = directions.mean_difference(y, holds)
    random = torch.randn(len(dim), generator=torch.Generator().manual_seed(config.seed + c))
    tuned = directions.rank_one_finetuned(
        judge.target, sample, c, layer, dim.to(judge.target.device), mean.to(judge.target.device), steps=config.reft_steps, seed=config.seed
    )
    names = ("difference in means", "probe", "ReFT-r1", "random direction")
    vectors = torch.stack([dim, directions.probe(y, holds), tuned, random])
    bank = directions.Directions.of(judge.target, {layer: vectors}, {layer: mean})
    for i, (name, vector) in enumerate(zip(names, vectors, strict=True)):
        told = float(directions_auroc(y @ vector, row, holds, sample, c))
        site = bank.sites[0].name
        yield Steerer(name, "", "direction", bank, Intervention("add", one(site, i)), site, i, told)


def best_layer(sample: Sample, fitted: tuple, c: int) -> tuple[int, Tensor]:
    """The layer at whose output the difference in means tells a concept best on fold A, and the mean output there."""
    outputs, row, held = fitted
    told = {}
    for layer, y in outputs.items():
        told[layer] = directions_auroc(y @ directions.mean_difference(y, held[:, c]), row, held[:, c], sample, c)
    layer = max(told, key=lambda one_of: told[one_of])
    return layer, outputs[layer].mean(0)


def directions_auroc(strength: Tensor, row: Tensor, holds: Tensor, sample: Sample, c: int) -> float:
    """AUROC of a direction at tokens, or of its mean over rows for a topic: as for components."""
    if not sample.concepts[c].of_documents:
        return float(auroc(strength[:, None], holds[:, None]))
    total = torch.zeros(len(sample.index)).index_add_(0, row, strength)
    return float(auroc((total / torch.bincount(row, minlength=len(sample.index)))[:, None], sample.topic[:, c : c + 1]))


def _steered(way: Steerer, sample: Sample, folds: Sequence[Prompts], judge: Detector, config: SteeringConfig) -> list[dict[str, Any]]:
    """Rows of one way to steer: every factor on B and C, and which factor B chooses."""
    about = {"method": way.method, "run": way.run, "form": way.form, "site": way.site, "component": way.component}
    rows = [about | {"metric": "selection_auroc", "value": way.auroc, "split": "A", "n": len(sample.index)}]
    batch = reference(way.decomposer, sample)
    cached = is_positionwise(way.decomposer, folds[0].tokens)
    by_factor: dict[float, dict[str, list[dict[str, Any]]]] = {}
    start, before = 1.0, math.nan
    for factor in config.factors:
        set_to = matched(way.decomposer, batch, way.intervention, factor, start if math.isnan(before) else start * factor / before)
        if set_to is None:
            reason = "no amount changes the outputs by this much"
            rows += [about | {"factor": factor, "split": f.fold, "metric": "score", "value": math.nan, "reason": reason} for f in folds]
            continue
        start, before = float(set_to.amount), factor
        by_factor[factor] = {}
        for fold in folds:
            text = generate(way.decomposer, fold.tokens, config.length, set_to, config.temperature, _draws(config, fold.fold), cached)
            by_factor[factor][fold.fold] = measured(way.decomposer, text, fold, sample, judge, config)
    return rows + [about | row for row in _with_choice(by_factor)]


def reference(decomposer: Decomposer, sample: Sample, rows: int = 6) -> Batch:
    """A few rows of fold A with clean activations: where strengths are measured."""
    batch = sample.source.batch(sample.split, sample.index[:: max(1, len(sample.index) // rows)][:rows]).to(decomposer.target.device)
    assert batch.x is not None
    batch.clean, _ = decomposer.target.clean(batch.x, clean_points(decomposer), logits=False)
    return batch


def measured(
    judge: Decomposer, text: Int[Tensor, "n length"], fold: Prompts, sample: Sample, detector: Detector, config: SteeringConfig
) -> list[dict[str, Any]]:
    """Concept, fluency and their harmonic mean of generated texts, with what they are made of."""
    read = [sample.pieces.text(ids) for ids in text.tolist()]
    base = detector.score([sample.pieces.text(ids) for ids in fold.unsteered.tolist()]).mean()
    nll, tokens = continuation_nll(judge, fold.tokens, text).cpu().numpy(), text.cpu().numpy()
    concept = np.clip(detector.score(read) - base, 0, 1)
    smooth = fluency(nll, fold.nll, tokens, fold.natural)
    values = {
        "concept": concept,
        "fluency": smooth,
        "score": harmonic(concept, smooth),
        "detected": detector.score(read),
        "nll": nll,
        "variety": np.array([variety(row, fold.natural) for row in tokens]),
    }
    weights = resampled(len(nll), config.bootstrap)
    return [{"metric": name, **interval(value, weights)} for name, value in values.items()]


def _with_choice(by_factor: dict[float, dict[str, list[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """Rows with their factor and fold; `chosen` at the factor of the highest score on B."""

    def on_b(factor: float) -> float:
        return next(row["value"] for row in by_factor[factor]["B"] if row["metric"] == "score")

    best_factor = max(by_factor, key=on_b, default=math.nan)
    for factor, folds in by_factor.items():
        for fold, rows in folds.items():
            yield from ({**row, "factor": factor, "split": fold, "chosen": factor == best_factor} for row in rows)


def _prompted(
    judge: Decomposer, sample: Sample, c: int, folds: Sequence[Prompts], detector: Detector, config: SteeringConfig
) -> Iterator[dict[str, Any]]:
    """The prompt baseline: the beginning of a text of the concept from fold A stands before the prompt. Scored as if it did not."""
    share = sample.tokens[..., c].sum(1) / torch.from_numpy(sample.length - 1)
    source_rows = share.argsort(descending=True, stable=True)[: len(folds[0].tokens)]
    usable = [int(i) for i in source_rows if share[i] > 0 and sample.length[i] > max(config.prefixes)]
    by_factor: dict[float, dict[str, list[dict[str, Any]]]] = {}
    for width in config.prefixes if usable else ():
        kept = torch.from_numpy(sample.source.rows(sample.split).tokens[sample.index[usable]][:, 1 : 1 + width].astype(np.int64))
        by_factor[float(width)] = {}
        for fold in folds:
            prefix = kept[torch.arange(len(fold.tokens)) % len(kept)].to(fold.tokens.device)
            longer = torch.cat([fold.tokens[:, :1], prefix, fold.tokens[:, 1:]], 1)
            text = generate(judge, longer, config.length, None, config.temperature, _draws(config, fold.fold), cached=True)
            by_factor[float(width)][fold.fold] = measured(judge, text, fold, sample, detector, config)
    yield from ({"method": "prompt", "form": "prefix", **row} for row in _with_choice(by_factor))
