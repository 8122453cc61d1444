"""Which components of a dictionary are active: exact selection, calibrated thresholds, choices at inference."""

from __future__ import annotations

import itertools

import pytest
import torch

from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.errors import UserError
from tests.methods.dictionaries import batches, fit, generator, joined, make


@pytest.mark.parametrize("hint", [0.0, 0.5, 2.5, 100.0])
@pytest.mark.parametrize("count", [1, 40, 3000, 6400])
def test_the_largest_of_a_batch_are_exact_whatever_the_hint(count, hint):
    from decomp_bench.methods._sparse import top_of_batch

    pre = torch.randn(100, 64, generator=generator())
    positive = min(count, int((pre > 0).sum()))
    expected = pre.flatten().topk(positive).indices.sort().values
    assert torch.equal(top_of_batch(pre, count, hint).index, expected)


def test_ties_never_let_too_many_in():
    from decomp_bench.methods._sparse import top_of_batch, top_of_rows

    pre = torch.ones(10, 20)
    pre[:, 3] = 2
    assert top_of_batch(pre, 25).index.numel() == 25
    assert set(range(3, 200, 20)) <= set(top_of_batch(pre, 25).index.tolist())
    assert (top_of_rows(pre, 4).sum(1) == 4).all()
    assert top_of_rows(pre, 4)[:, 3].all()
    assert top_of_rows(-pre, 4).sum() == 0


@pytest.mark.parametrize(("features", "k"), [(50, 1), (50, 5), (50, 50), (50, 80), (1000, 1), (1003, 7), (999, 60), (70_000, 3)])
@pytest.mark.parametrize("values", ["all different", "many ties", "few positive"])
def test_the_largest_of_each_row_are_exact(features, k, values):
    from decomp_bench.methods._sparse import top_of_each_row, top_of_rows

    pre = torch.randn(7, 11, features, generator=generator())
    if values == "many ties":
        pre = (3 * pre).round()
    if values == "few positive":
        pre = torch.where(torch.arange(features) % 40 == 3, pre, -1.0)
    first = pre.double() - 1e-9 * torch.arange(features)  # of equal entries the first
    expected = torch.zeros_like(pre).scatter_(-1, first.topk(min(k, features)).indices, 1.0).bool() & (pre > 0)
    assert torch.equal(top_of_rows(pre, k), expected)
    assert torch.equal(top_of_each_row(pre.flatten(0, 1), k).gate().view_as(pre).bool(), expected)


def test_batchtopk_keeps_its_k_on_held_out_rows_after_a_short_run():
    data = batches(rows=256)
    decomposer = fit(make("transcoder", features=96, k=4, batch=256, calibration=8192), data, steps=200)
    unseen = Batch(clean={key: torch.cat(parts) for key, parts in joined(itertools.islice(data, 24)).items()})
    for k in (4, 2, 8, 3, 6):
        view = decomposer if k == 4 else decomposer.at(k=k)
        for name, codes in view.encode(unseen.clean).items():
            if codes.gate.sum() < (codes.strength > 0).sum():  # else fewer than k are ever positive
                assert float(codes.active.float().sum(1).mean()) == pytest.approx(k, rel=0.05), (name, k)
    alone = decomposer.encode({key: value[:1] for key, value in unseen.clean.items()})
    assert torch.equal(alone["0"].gate, decomposer.encode(unseen.clean)["0"].gate[:1])


def test_calibration_is_part_of_a_checkpoint(tmp_path):
    data = batches()
    decomposer = fit(make("transcoder"), data, steps=20)
    decomposer.save(tmp_path)
    batch = next(data)
    loaded = Decomposer.load(tmp_path, decomposer.target)
    for k in (None, 1, 5):
        first, second = (d.at(k=k).encode(batch.clean)["1"].value for d in (decomposer, loaded))
        assert torch.equal(first, second)


def test_a_choice_that_the_activation_does_not_have_is_refused():
    with pytest.raises(UserError, match="no inference-time threshold"):
        make("sae").at(threshold=1.0)
    with pytest.raises(UserError, match="no inference-time k"):
        make("sae", activation="relu").at(k=3)
    with pytest.raises(UserError, match="k=40 exceeds features=32"):
        make("sae", k=40)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated", "groupmax"])
def test_a_minimum_strength_only_removes_the_weaker_ones(activation):
    data = batches()
    decomposer = fit(make("sae", activation=activation), data, steps=20)
    batch = next(data)
    free = decomposer.encode(batch.clean)["0"]
    for threshold in (0.5, 1.0, 2.0):
        codes = decomposer.at(threshold=threshold).encode(batch.clean)["0"]
        assert torch.equal(codes.active, free.active & (free.strength > threshold))


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("rows", ["unit", "free"])
def test_wide_dictionaries_encode_a_few_rows_at_a_time_and_to_the_same_codes(activation, rows, monkeypatch):
    from decomp_bench.methods import _coder

    coder = make("transcoder", activation=activation, k=4, features=32, decoder_rows=rows).coders["0"]
    x = torch.randn(50, coder.W_enc.shape[1], generator=generator())
    (whole,) = coder.codes(x, None)
    gradient = torch.autograd.grad(whole.value.square().sum(), coder.W_enc)[0]
    calls = []
    raw = type(coder).raw
    monkeypatch.setattr(type(coder), "raw", lambda self, part: calls.append(len(part)) or raw(self, part))
    monkeypatch.setattr(_coder, "PART", 32 * 7)
    (parts,) = coder.codes(x, None)
    assert calls == [7] * 7 + [1]
    assert torch.equal(parts.support.index, whole.support.index)
    assert (parts.support.rows, parts.support.features) == (50, 32)
    torch.testing.assert_close(parts.value, whole.value)
    torch.testing.assert_close(torch.autograd.grad(parts.value.square().sum(), coder.W_enc)[0], gradient)
