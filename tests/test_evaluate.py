"""The sanity suite: scores that are known beforehand, and invariances that every metric must have."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from decomp_bench.config import EvalConfig
from decomp_bench.data import pydocs
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.statistics import output_statistics
from decomp_bench.errors import UserError
from decomp_bench.evaluate import evaluate
from tests.conftest import open_target
from tests.planted import Basis, Mean, Zero, make

CONFIG = EvalConfig(tokens=2000, bootstrap=50)


def table(decomposer, source, config=CONFIG):
    """(protocol, gates, metric, layer) -> value."""
    (found,) = evaluate([decomposer], source, config)
    return {(r["protocol"], r["gates"], r["metric"], r["layer"], r["site"]): r["value"] for r in found.rows}, found


@pytest.mark.parametrize("protocol", ["cascading", "clean", "single"])
def test_the_identity_costs_nothing_and_the_bases_are_what_they_say(lm, protocol):
    target, source = lm
    identity, _ = table(make(Basis, target), source)
    of = lambda found, metric: found[protocol, "self", metric, "all", "all"]
    assert of(identity, "ce_delta") == pytest.approx(0, abs=1e-6)
    assert of(identity, "kl") == pytest.approx(0, abs=1e-6)
    assert of(identity, "fvu") == pytest.approx(0, abs=1e-9)
    assert of(identity, "agreement") == 1
    assert of(identity, "ce_recovered_mean") == pytest.approx(1, abs=1e-4)
    assert of(identity, "l0_mlp") == pytest.approx(target.width)
    zero, _ = table(make(Zero, target), source)
    assert of(zero, "ce") == pytest.approx(of(zero, "ce_zero"), abs=1e-6)
    assert of(zero, "ce_recovered_zero") == pytest.approx(0, abs=1e-6)
    assert of(zero, "norm_mse") == pytest.approx(1, abs=1e-6)
    assert of(zero, "l0_mlp") == 0
    assert of(zero, "dead") == 1
    mean = make(Mean, target)
    mean.statistics = output_statistics(source)
    found, _ = table(mean, source)
    assert of(found, "ce") == pytest.approx(of(found, "ce_mean"), abs=1e-6)
    assert of(found, "ce_recovered_mean") == pytest.approx(0, abs=1e-6)
    assert of(found, "fvu") == pytest.approx(1, abs=0.02)  # the mean is the training split's, not the test split's


def test_every_metric_is_independent_of_the_batch_size(lm):
    target, source = lm
    one, _ = table(make(Zero, target), source, CONFIG)
    other, _ = table(make(Zero, target), source, EvalConfig(tokens=2000, bootstrap=50, batch=3))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value == pytest.approx(other[key], rel=1e-5, abs=1e-7, nan_ok=True), key


def test_fvu_does_not_depend_on_scale_of_errors_and_outputs_alike(lm):
    from decomp_bench.metrics import CATALOGUE, Context

    sums = {("error", "0"): np.array([3.0]), ("variance", "0"): np.array([12.0]), ("power", "0"): np.array([15.0])}
    scaled = {key: 100 * value for key, value in sums.items()}
    context = Context((0,), (), "lm", "clean")
    for key in ("fvu", "norm_mse"):
        assert CATALOGUE[key].compute(sums, context) == CATALOGUE[key].compute(scaled, context)


def test_evaluation_leaves_weights_and_the_global_generator_alone(lm):
    target, source = lm
    before, state = {k: v.clone() for k, v in target.module.state_dict().items()}, torch.get_rng_state()
    table(make(Basis, target), source)
    assert all(torch.equal(v, target.module.state_dict()[k]) for k, v in before.items())
    assert torch.equal(state, torch.get_rng_state())


def test_intervals_hold_the_value_and_documents_add_up(lm):
    target, source = lm
    _, found = table(make(Zero, target), source)
    row = next(r for r in found.rows if r["metric"] == "ce_delta" and r["protocol"] == "cascading")
    assert row["lo"] <= row["value"] <= row["hi"]
    assert row["lo"] < row["hi"]
    part = found.documents.query("protocol == 'cascading' and gates == 'self'")
    assert part["tokens@all"].sum() == row["n"]
    by_hand = (part["ce@all"] - part["ce_clean@all"]).sum() / part["targets@all"].sum()
    assert by_hand == pytest.approx(row["value"], rel=1e-9)


def test_cross_entropy_of_the_clean_model_by_hand(lm):
    target, source = lm
    found, _ = table(make(Basis, target), source)
    rows = source.evaluation_rows("test", 2000)
    total, count = 0.0, 0
    for i in range(rows):
        batch = source.batch("test", np.array([i]))
        logp = torch.log_softmax(target(batch.x), -1)
        for t in range(1, int(batch.length[0]) - 1):
            total, count = total - float(logp[0, t, batch.x[0, t + 1]]), count + 1
    assert found["clean", "self", "ce_clean", "all", "all"] == pytest.approx(total / count, rel=1e-5)


def test_a_toy_is_scored_by_its_output_error(toy):
    target, source = toy
    found, _ = table(make(Zero, target), source)
    assert found["cascading", "self", "output_mse", "all", "all"] > 0
    assert not any(metric == "ce_delta" for _, _, metric, _, _ in found)


def test_gates_that_read_later_layers_are_not_applicable_on_the_replaced_stream(lm):
    target, source = lm
    decomposer = make(Basis, target)
    last = f"{target.layers - 1}.mlp.out"
    decomposer.sites = [replace(site, gates_from=(site.slots[0].read, last)) for site in decomposer.sites]
    (found,) = evaluate([decomposer], source, CONFIG)
    row = {(r["protocol"], r["gates"]): r for r in found.rows if r["metric"] == "ce_delta" and r["layer"] == "all"}
    assert row["cascading", "self"]["applicable"] == "no"
    assert "after its site" in row["cascading", "self"]["reason"]
    assert row["cascading", "clean"]["applicable"] == "yes"
    assert row["clean", "self"]["value"] == row["clean", "clean"]["value"]


def test_on_text_sampled_from_the_target_the_cross_entropy_rises_by_the_kl(monkeypatch, tmp_path):
    for file in cache_dir().glob("pydocs-*.json"):
        (tmp_path / file.name).symlink_to(file.resolve())
    whole = pydocs.documents
    monkeypatch.setattr(pydocs, "documents", lambda split: islice(whole(split), 60))  # it takes long to read, and is not what is scored
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path))
    target, source = open_target("pydocs-4l", None)
    _, found = table(make(Zero, target, (2,)), source, EvalConfig(split="stream", tokens=3000, bootstrap=100, protocols=("cascading",)))
    row = {r["metric"]: r for r in found.rows if r["gates"] == "self" and r["layer"] == "all"}
    assert row["ce_delta"]["lo"] < row["kl"]["value"] < row["ce_delta"]["hi"]
    assert row["kl"]["value"] > 0.05


def test_a_target_without_a_stream_says_so(lm):
    with pytest.raises(UserError, match="no sampled stream"):
        lm[1].rows("stream")
