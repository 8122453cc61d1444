"""Comparisons of runs: paired over documents, honest about seeds, corrected for how many were made."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decomp_bench.bootstrap import documents_frame
from decomp_bench.comparison import compare, holm
from decomp_bench.errors import UserError
from decomp_bench.metrics import Context


def frame(errors, token_hash="t"):
    arrays = {
        ("tokens", "all"): np.full(len(errors), 10.0),
        ("targets", "all"): np.full(len(errors), 10.0),
        ("ce", "all"): np.asarray(errors) + 20.0,
        ("ce_clean", "all"): np.full(len(errors), 20.0),
    }
    about = {
        "method": "m",
        "family": "f",
        "variant": "v",
        "curve": "trained",
        "kind": "replacement",
        "target": "x",
        "target_hash": "h",
        "token_hash": token_hash,
        "split": "test",
        "layers": "0",
        "protocol": "cascading",
        "gates": "self",
        "mask": "binary",
        "delta": "off",
    }
    return documents_frame(arrays, Context((0,), (), "lm", "cascading"), about)


def test_a_paired_interval_is_narrower_than_the_documents_spread():
    errors = np.random.default_rng(0).normal(5, 3, 60)
    found = compare([frame(errors)], [frame(errors + 1)], 500).set_index("metric").loc["ce_delta"]
    assert found["difference"] == pytest.approx(0.1)
    assert found["lo"] == pytest.approx(0.1)
    assert found["hi"] == pytest.approx(0.1)
    shuffled = compare([frame(errors)], [frame(np.random.default_rng(1).permutation(errors) + 1)], 500).set_index("metric").loc["ce_delta"]
    assert shuffled["difference"] == pytest.approx(0.1)
    assert shuffled["hi"] - shuffled["lo"] > 0.1


def test_runs_on_other_tokens_are_not_compared():
    with pytest.raises(UserError, match="token_hash"):
        compare([frame(np.ones(5))], [frame(np.ones(5), "other")])


def noisy(generator, seeds: int, documents: np.ndarray, spread: float = 1.0) -> list[pd.DataFrame]:
    """Runs whose seeds differ by more than their documents' noise does."""
    return [frame(documents + generator.normal(0, spread) + generator.normal(0, 0.1, len(documents))) for _ in range(seeds)]


def test_seeds_count_as_seeds_and_not_as_more_documents():
    """Of methods that are equally good, documents alone call most pairs different; seeds and documents call few so."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(25):
        documents = generator.normal(5, 3, 40)
        one, other = (noisy(generator, 5, documents) for _ in range(2))
        both = compare(one, other, 100).set_index("metric").loc["ce_delta"]
        alone = compare(one[:1], other[:1], 100).set_index("metric").loc["ce_delta"]
        found.append((both["p"] < 0.05, alone["p"] < 0.05))
    together, documents_only = np.mean(found, 0)
    assert documents_only > 0.5
    assert together < 0.25  # five seeds resampled are still a few degrees of freedom short of 5%


def test_a_difference_beyond_the_seeds_is_found():
    generator = np.random.default_rng(1)
    documents = generator.normal(5, 3, 40)
    found = compare(noisy(generator, 5, documents), noisy(generator, 5, documents + 4), 500).set_index("metric").loc["ce_delta"]
    assert found["lo"] > 0
    assert found["p"] < 0.05
    assert found["seeds"] == "5, 5"
    assert found["difference"] == pytest.approx(0.4, abs=0.2)


def test_identical_runs_differ_by_nothing():
    errors = np.random.default_rng(0).normal(5, 3, 30)
    found = compare([frame(errors)], [frame(errors)], 100).set_index("metric").loc["ce_delta"]
    assert (found["difference"], found["lo"], found["hi"], found["p"], found["p_holm"]) == (0, 0, 0, 1, 1)


def test_holm_as_published():
    """The example of Holm 1979 in the form that textbooks give: p (n - i), made monotone, at most 1."""
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.5, np.nan, 0.9])) == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_none_and_bonferroni(values):
    p = np.array(values)
    corrected = holm(p)
    assert (corrected >= p - 1e-12).all()
    assert (corrected <= np.minimum(1, len(p) * p) + 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(corrected[order]) >= -1e-12).all()
