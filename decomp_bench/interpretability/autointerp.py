"""Explanations by a language model, and how well another tells by them when a component is active.

Explanation: from contexts of fold A, the strongest and some of every strength, with the tokens marked at which the component is active.
Detection (after Paulo et al. 2025 and SAEBench): which of some contexts of fold C the component is active in; as many active as inactive
ones, half of the inactive ones near misses, the component silent throughout. Fuzzing: in which contexts the right tokens are marked; in
the others as many tokens of equally active contexts are marked at random. Both are scored by balanced accuracy, so that chance is 0.5
whatever is answered. A reply that cannot be read is missing. The control is the explanation of another component of like density.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import PositiveInt

from decomp_bench.interpretability.contexts import AFTER, BEFORE
from decomp_bench.interpretability.examples import banded, near_misses, silent, silent_ones, some
from decomp_bench.interpretability.harvest import Activity, HarvestConfig, Text
from decomp_bench.judge import Judge, JudgeConfig, Messages

OPEN, CLOSE = "⟦", "⟧"
"""What marks tokens: characters that code and its documentation do not use."""
WORDS = 40
"""Words of an explanation at most."""


class AutointerpConfig(HarvestConfig):
    """How components are explained and by whom."""

    judge: JudgeConfig
    """Who answers by the explanations."""
    explainer: JudgeConfig | None = None
    """Who explains; None: the judge. Another model, if the score is not to reward agreement with oneself."""
    components: PositiveInt = 24
    strongest: PositiveInt = 10
    """Contexts that an explanation is made from, of the largest sizes,"""
    spread: PositiveInt = 6
    """and of all sizes."""
    contexts: PositiveInt = 12
    """Contexts of each question, half of them active (or marked rightly)."""
    fuzzing: bool = True
    """Ask about marked tokens too."""


@dataclass(frozen=True)
class Question:
    """Contexts as texts, and in which of them the component is active (or the right tokens are marked)."""

    contexts: tuple[str, ...]
    right: tuple[bool, ...]


class Reader:
    """Contexts as text."""

    def __init__(self, text: Text, pieces: Sequence[str]) -> None:
        self.text, self.pieces = text, pieces

    def show(self, at: int, marked: Bool[np.ndarray, " w"]) -> str:
        """The context around a position, with some of its tokens marked."""
        parts = []
        for step, mark in zip(range(-BEFORE, AFTER + 1), marked.tolist(), strict=True):
            token = int(self.text.around(np.array([at]), step)[0])
            piece = self.pieces[token] if 0 <= token < len(self.pieces) else ""
            parts.append(f"{OPEN}{piece}{CLOSE}" if mark and piece else piece)
        return "".join(parts).replace(CLOSE + OPEN, "")

    def active(self, size: Float[np.ndarray, " P"], at: int) -> Bool[np.ndarray, " w"]:
        """Which tokens of the context around a position the component is active at."""
        near = [int(self.text.near(np.array([at]), step)[0]) for step in range(-BEFORE, AFTER + 1)]
        return np.array([other >= 0 and size[other] > 0 for other in near])


def examples(text: Text, size: Float[np.ndarray, " P"], config: AutointerpConfig, generator: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Positions that an explanation is made from: the strongest of each row, then some of every strength."""
    order = np.argsort(-size, kind="stable")
    order = order[size[order] > 0]
    _, first = np.unique(text.row[order], return_index=True)
    strongest = order[np.sort(first)][: config.strongest]
    rest = [some(np.setdiff1d(band, strongest), -(-config.spread // 3), generator) for band in banded(size, 3)]
    return np.concatenate([strongest, *rest])[: config.strongest + config.spread]


def detection(reader: Reader, size: Float[np.ndarray, " P"], config: AutointerpConfig, generator: np.random.Generator) -> Question:
    """Unmarked contexts, as many active as inactive ones, in random order; fewer where there are not enough."""
    half = config.contexts // 2
    active = _spread(size, half, generator)
    near = near_misses(reader.text, size, some(np.flatnonzero(size > 0), 4 * half, generator), generator)
    near = np.unique(near)
    near = some(near[silent(reader.text, size, near, BEFORE, AFTER)], half // 2, generator)
    quiet = np.setdiff1d(np.flatnonzero(size == 0), near)
    random = silent_ones(reader.text, size, quiet, half - len(near), (BEFORE, AFTER), generator)
    least = min(len(active), len(near) + len(random))
    inactive = np.concatenate([near, random])[:least]
    blank = np.zeros(BEFORE + AFTER + 1, bool)
    shown = [(reader.show(int(at), blank), True) for at in active[:least]] + [(reader.show(int(at), blank), False) for at in inactive]
    return _shuffled(shown, generator)


def fuzzing(reader: Reader, size: Float[np.ndarray, " P"], config: AutointerpConfig, generator: np.random.Generator) -> Question:
    """Active contexts, half with the active tokens marked, half with as many of their inactive tokens."""
    shown = []
    for i, at in enumerate(generator.permutation(_spread(size, config.contexts, generator))):
        marked = reader.active(size, int(at))
        there = np.array([reader.text.around(np.array([at]), step)[0] >= 0 for step in range(-BEFORE, AFTER + 1)])
        others = np.flatnonzero(~marked & there)
        count = min(int(marked.sum()), len(others))
        if i % 2 and count:
            wrong = np.zeros_like(marked)
            wrong[some(others, count, generator)] = True
            shown.append((reader.show(int(at), wrong), False))
        elif not i % 2:
            shown.append((reader.show(int(at), marked), True))
    return _shuffled(shown, generator)


def _spread(size: Float[np.ndarray, " P"], count: int, generator: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Active positions of every strength, in random order."""
    bands = banded(size, max(1, min(count, 3)))
    return generator.permutation(np.concatenate([some(band, -(-count // len(bands)), generator) for band in bands]))[:count]


def _shuffled(shown: list[tuple[str, bool]], generator: np.random.Generator) -> Question:
    order = generator.permutation(len(shown))
    return Question(tuple(shown[i][0] for i in order), tuple(shown[i][1] for i in order))


# ---- what is asked and how it is read


def ask_explanation(shown: Sequence[str]) -> Messages:
    """The request for an explanation of marked contexts."""
    task = (
        "A component of a language model is active at certain tokens. In the excerpts below, the tokens where it is active stand between "
        f"{OPEN} and {CLOSE}; these marks are no part of the text. Say in at most 20 words what the marked tokens, in their contexts, "
        'have in common. Reply with one JSON object: {"explanation": "..."}'
    )
    return [{"role": "user", "content": task + "\n\n" + _numbered(shown)}]


def ask_which(kind: str, explanation: str, shown: Sequence[str]) -> Messages:
    """The request to say which contexts fit an explanation; `kind` is detection or fuzzing."""
    about = (
        "In which of the excerpts is it active at some token?"
        if kind == "detection"
        else f"In some of the excerpts the tokens where it is active were put in {OPEN} and {CLOSE}, in others wrong tokens were. "
        "In which are the right tokens marked?"
    )
    task = (
        f"A component of a language model is described so: {explanation}\n{about} Any number of them may be. Reply with one JSON object "
        'that lists their numbers: {"active": [...]}'
    )
    return [{"role": "user", "content": task + "\n\n" + _numbered(shown)}]


def _numbered(shown: Sequence[str]) -> str:
    return "\n".join(f"{i}: {json.dumps(text, ensure_ascii=False)}" for i, text in enumerate(shown, 1))


def _object(text: str) -> dict:
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    if not isinstance(found, dict):
        raise TypeError
    return found


def read_explanation(text: str) -> str:
    """The explanation of a reply; raises ValueError for one that is empty, far too long, or about the marks."""
    found = _object(text)["explanation"]
    if not isinstance(found, str) or not 0 < len(found.split()) <= WORDS or OPEN in found or CLOSE in found:
        raise ValueError("no explanation")
    return found.strip()


def read_numbers(count: int) -> Callable[[str], list[int]]:
    """A parser of replies that list numbers from 1 to `count`, each at most once."""

    def parse(text: str) -> list[int]:
        found = _object(text)["active"]
        if not isinstance(found, list) or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= count for n in found):
            raise ValueError("no list of numbers")
        if len(set(found)) < len(found):
            raise ValueError("a number twice")
        return found

    return parse


# ---- all of it


@dataclass(frozen=True)
class Outcome:
    """Of each component its explanation ('' where it is missing), and its scores; NaN where a reply is missing."""

    explanations: list[str]
    scores: dict[tuple[str, str], Float[np.ndarray, " m"]]
    """(detection or fuzzing, own or other) -> balanced accuracy by the component's own explanation, or another's."""
    asked: dict[tuple[str, str], int]
    """Requests of each kind, explanations among them."""
    missing: dict[tuple[str, str], list[str]]
    """Why replies are missing, of those that are."""


def explained(
    fit: Text, held: Text, activity: Activity, pieces: Sequence[str], config: AutointerpConfig, judges: tuple[Judge, Judge]
) -> Outcome:
    """Explain every component, and score its explanation and another's; the judges are who explains and who answers."""
    m = activity.fit.shape[1]
    makers = [np.random.default_rng([config.seed, 3, c]) for c in range(m)]
    reader = Reader(fit, pieces)
    requests = []
    for c in range(m):
        size = activity.fit[:, c]
        shown = [reader.show(int(at), reader.active(size, int(at))) for at in examples(fit, size, config, makers[c])]
        requests.append(ask_explanation(shown))
    verdicts = judges[0].ask_all(requests, read_explanation)
    explanations = [verdict.value or "" for verdict in verdicts]
    key = ("explanation", "own")
    outcome = Outcome(explanations, {}, {key: m}, {key: [verdict.reason for verdict in verdicts if verdict.value is None]})
    there = [c for c in range(m) if explanations[c]]
    for kind, make in (("detection", detection), ("fuzzing", fuzzing))[: 1 + config.fuzzing]:
        questions = [make(Reader(held, pieces), activity.held[:, c], config, makers[c]) for c in range(m)]
        for whose in ("own", "other"):
            said = {c: explanations[c if whose == "own" else _next(there, c)] for c in there if whose == "own" or len(there) > 1}
            _answered(outcome, (kind, whose), questions, said, judges[1])
    return outcome


def _next(there: Sequence[int], c: int) -> int:
    """The component after this one in the order of density, of those that have an explanation."""
    return there[(there.index(c) + 1) % len(there)]


def _answered(outcome: Outcome, key: tuple[str, str], questions: Sequence[Question], said: dict[int, str], judge: Judge) -> None:
    """Ask every question by the explanation that goes with it, and take down the scores."""
    asked = [c for c in said if len(set(questions[c].right)) == 2]
    scores, why = np.full(len(questions), np.nan), []
    longest = max((len(questions[c].contexts) for c in asked), default=0)
    for count in range(2, longest + 1):  # a reply is read by the number of contexts that were shown
        same = [c for c in asked if len(questions[c].contexts) == count]
        verdicts = judge.ask_all([ask_which(key[0], said[c], questions[c].contexts) for c in same], read_numbers(count)) if same else []
        for c, verdict in zip(same, verdicts, strict=True):
            if verdict.value is None:
                why.append(verdict.reason)
            else:
                scores[c] = accuracy(verdict.value, questions[c].right)
    outcome.scores[key], outcome.asked[key], outcome.missing[key] = scores, len(asked), why


def accuracy(numbers: Sequence[int], right: Sequence[bool]) -> float:
    """Balanced accuracy of the numbers (from 1) that were listed."""
    listed, held = np.isin(np.arange(1, len(right) + 1), list(numbers)), np.array(right)
    return float((listed[held].mean() + (~listed[~held]).mean()) / 2)
