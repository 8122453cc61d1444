"""Detectors: how surely a text has a concept, from 0 to 1, by a program that knows nothing of any decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from decomp_bench.bootstrap import resampled, spread
from decomp_bench.concepts.base import Concept
from decomp_bench.concepts.sample import Sample, half_of
from decomp_bench.errors import UserError

HELD_OUT = 3
"""Every third document of the detectors' fold is not trained on."""
RESAMPLES = 500
"""Of the held-out documents, behind a detector's interval."""


@dataclass(frozen=True)
class Detector:
    """A concept's detector and its AUROC on texts of documents that it was not made from."""

    concept: Concept
    auroc: float
    texts: int
    lo: float = math.nan
    hi: float = math.nan
    """Ends of the AUROC's 95% interval over held-out documents."""
    model: Any = None
    usual: float = 1.0
    """Share of characters where a concept of spans holds, in texts that have it: there the score is one."""

    @property
    def by_definition(self) -> bool:
        """Whether the detector is the concept's own definition, so that its AUROC says nothing."""
        return not self.concept.of_documents

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Calibrated probability of a topic, or the share of a concept of spans over its usual share, at most one."""
        if self.model is not None:
            return self.model.predict_proba(list(texts))[:, 1] if len(texts) else np.zeros(0)
        return np.array([min(1.0, self.concept.share(text) / self.usual) for text in texts])


def windows(sample: Sample, width: int) -> tuple[list[str], np.ndarray]:
    """Texts of `width` tokens that tile a sample's rows, and the row that each comes from."""
    starts = [(row, at) for row, length in enumerate(sample.length) for at in range(1, int(length) - width + 1, width)]
    if not starts:
        raise UserError(f"no row of {width + 1} tokens in the {sample.split} split: make the generated texts shorter")
    return [sample.text(row, at, at + width) for row, at in starts], np.array([row for row, _ in starts])


def detectors(sample: Sample, width: int) -> list[Detector]:
    """A detector for each concept of a sample of fold D, for texts of `width` tokens; NaN as AUROC where a class is missing."""
    texts, rows = windows(sample, width)
    names = sample.source.rows(sample.split).documents
    assert all(half_of(names[doc]) == "D" for doc in np.unique(sample.documents)) or sample.fold != "D"
    return [
        _detector(concept, texts, _labels(sample, c, concept, texts, rows), sample.documents[rows])
        for c, concept in enumerate(sample.concepts)
    ]


def _labels(sample: Sample, c: int, concept: Concept, texts: list[str], rows: np.ndarray) -> np.ndarray:
    return sample.topic[:, c].numpy()[rows] if concept.of_documents else np.array([bool(concept.spans(text)) for text in texts])


def _detector(concept: Concept, texts: list[str], labels: np.ndarray, documents: np.ndarray) -> Detector:
    held_out = documents % HELD_OUT == 0
    train = ~held_out
    model, usual = None, 1.0
    if concept.of_documents:
        model = _bag_of_words([t for t, keep in zip(texts, train, strict=True) if keep], labels[train])
    elif labels[train].any():
        shares = [concept.share(text) for text, keep in zip(texts, labels & train, strict=True) if keep]
        usual = float(np.mean(shares))
    found = Detector(concept, math.nan, int(held_out.sum()), model=model, usual=usual)
    rest = [text for text, keep in zip(texts, held_out, strict=True) if keep]
    if len(set(labels[held_out])) < 2 or (concept.of_documents and model is None):
        return found
    resamples = aurocs(found.score(rest), labels[held_out], documents[held_out], RESAMPLES)
    about = spread(resamples, len(rest))
    return replace(found, auroc=about["value"], lo=about["lo"], hi=about["hi"])


def aurocs(scores: np.ndarray, labels: np.ndarray, documents: np.ndarray, replicates: int) -> np.ndarray:
    """AUROC of texts, ties counted as half: of all [first], then of resamples of their documents; NaN where a class is missing."""
    _, document = np.unique(documents, return_inverse=True)
    order = np.argsort(scores, kind="stable")
    weights = resampled(int(document.max()) + 1, replicates)[:, document[order]]
    edge = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    positive, negative = (np.add.reduceat(weights * side, edge, axis=1) for side in (labels[order], ~labels[order]))
    below = negative.cumsum(1) - negative
    pairs = positive.sum(1) * negative.sum(1)
    return np.divide((positive * (below + negative / 2)).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _bag_of_words(texts: list[str], labels: np.ndarray) -> Any:
    """Logistic regression on which words a text has, Platt-calibrated on folds; None where it cannot be trained."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if min(labels.sum(), len(labels) - labels.sum()) < 6:
        return None
    words = CountVectorizer(binary=True, min_df=2, max_features=20_000, token_pattern=r"[A-Za-z_]{2,}")
    model = CalibratedClassifierCV(LogisticRegression(C=1.0, max_iter=300, class_weight="balanced"), cv=3)
    try:
        return make_pipeline(words, model).fit(texts, labels)
    except ValueError:  # no words at all
        return None
