"""AUROC with ties: recorded values, pairs counted by hand, scikit-learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decomp_bench.auroc import auroc
from tests.golden.recorded import Golden

CASES = ("constant", "no_ties", "one_negative_fires", "one_positive_fires", "saturated", "separable")


@pytest.mark.parametrize("case", CASES)
def test_ties_count_half_as_recorded(case: str):
    golden = Golden("metrics_auroc")
    labels = golden["in.labels"].bool()[:, None]
    found = auroc(golden[f"in.{case}"][:, None], labels)
    torch.testing.assert_close(found[0, 0], golden[f"out.mann_whitney.{case}"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=2, max_size=40))
def test_it_is_the_share_of_pairs_in_order(pairs):
    values = torch.tensor([float(v) for v, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    found = float(auroc(values[:, None], labels[:, None]))
    positive, negative = values[labels], values[~labels]
    if not len(positive) or not len(negative):
        assert found != found
        return
    compared = positive[:, None] - negative[None]
    assert found == pytest.approx(float(((compared > 0) + 0.5 * (compared == 0)).mean()))


def test_many_columns_and_labels_agree_with_scikit_learn():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 7, generator=generator) * (torch.rand(400, 7, generator=generator) < 0.2)
    values = (4 * values).round() / 4
    labels = torch.rand(400, 3, generator=generator) < torch.tensor([0.1, 0.5, 0.9])
    found = auroc(values, labels)
    for i in range(7):
        for c in range(3):
            assert float(found[i, c]) == pytest.approx(roc_auc_score(labels[:, c], values[:, i]))


def test_a_million_sparse_tokens_take_no_dense_sort(monkeypatch):
    import decomp_bench.auroc as module

    values = torch.zeros(1_000_000, 8)
    values[::997] = 1.0
    labels = torch.zeros(1_000_000, 1, dtype=torch.bool)
    labels[::997] = True
    sizes = []
    places = module._tied_places
    monkeypatch.setattr(module, "_tied_places", lambda column, value: sizes.append(len(value)) or places(column, value))
    assert auroc(values, labels).eq(1).all()
    assert sum(sizes) == 8 * 1004
