"""Transcoders and CLTs trained on the output of the target that they make up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decomp_bench.config import TrainConfig, parse
from decomp_bench.data.streams import SequenceStream, with_clean
from decomp_bench.decomposer import Decomposer
from decomp_bench.errors import UserError
from decomp_bench.registry import method
from decomp_bench.replacement import clean_points, replaced
from decomp_bench.train import Job, train

SMALL = {"features": 48, "k": 4, "calibration": 1024, "batch": 8}


def make(name: str, target, **config) -> Decomposer:
    kind = method(name)
    return kind(parse(kind.Config, {**SMALL, **config}, name), target, tuple(range(target.layers)), 0)


def kl(decomposer, source, protocol: str) -> float:
    """Mean KL of the first validation rows, with gates from the stream at hand."""
    batch = with_clean(source, source.batch("validation", np.arange(24)), clean_points(decomposer))
    real = (torch.arange(batch.x.shape[1]) < batch.length[:, None]) & (torch.arange(batch.x.shape[1]) > 0)
    passes = [(layer,) for layer in decomposer.layers] if protocol == "single" else [decomposer.layers]
    with torch.no_grad():
        found = [replaced(decomposer, batch, layers, protocol).logits.log_softmax(-1)[real] for layers in passes]
    clean = batch.logits.log_softmax(-1)[real]
    return float(np.mean([(clean.exp() * (clean - out)).sum(-1).mean() for out in found]))


@pytest.mark.parametrize("name", ["transcoder", pytest.param("clt", marks=pytest.mark.slow)])
def test_training_under_a_protocol_is_best_under_that_protocol(name, lm, tmp_path):
    target, source = lm
    found = {}
    for mode in ("cascading", "clean"):
        decomposer = make(name, target, train_on=mode, steps=80, lr=1e-2)
        assert decomposer.trains_on == "sequences"
        (outcome,) = train([Job(decomposer, tmp_path / mode)], source, TrainConfig())
        assert outcome.error is None
        found[mode] = {protocol: kl(decomposer.eval(), source, protocol) for protocol in ("cascading", "clean")}
        assert decomposer.family == f"{name}, end to end ({mode})"
    assert found["cascading"]["cascading"] < found["clean"]["cascading"]
    assert found["clean"]["clean"] < found["cascading"]["clean"]


@pytest.mark.parametrize("name", ["transcoder", "clt"])
@pytest.mark.parametrize("mode", ["cascading", "clean", "single"])
@pytest.mark.parametrize("config", [{"activation": "topk"}, {"activation": "jumprelu", "l0": 0.0}, {"activation": "relu", "skip": True}])
def test_the_loss_is_the_divergence_that_evaluation_measures(name, mode, config, lm):
    """With an activation whose codes are the same in training, the term equals a replaced pass by `encode` and `decode`."""
    target, source = lm
    decomposer = make(name, target, train_on=mode, aux=0.0, **({"l1": 0.0} if config["activation"] == "relu" else {}), **config)
    stream = SequenceStream(source, clean_points(decomposer), 24, "validation")
    stream._order = (0, np.arange(source.size("validation")))
    batch = with_clean(source, source.batch("validation", np.arange(24)), clean_points(decomposer))
    assert int(batch.length.min()) < batch.x.shape[1], "rows of unequal length"
    decomposer.before_training(iter([batch] * 40))
    if decomposer.has_skip:
        with torch.no_grad():
            for coder in decomposer.coders.values():
                coder.W_skip.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    terms = decomposer.train().loss(batch, 1.0)
    assert float(terms["kl"]) == pytest.approx(kl(decomposer.eval(), source, mode), rel=1e-4)
    decomposer.train().loss(batch, 1.0)["kl"].backward()
    for key, parameter in decomposer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    if mode != "single":  # a first layer's error reaches every later one
        assert all(coder.W_enc.grad.abs().max() > 0 for coder in decomposer.coders.values())


def test_padding_takes_no_part_in_a_batch_selection(lm):
    target, source = lm
    decomposer = make("transcoder", target, train_on="cascading")
    batch = with_clean(source, source.batch("validation", np.arange(12)), clean_points(decomposer))
    decomposer.before_training(iter([batch] * 80))
    decomposer.train().loss(batch, 1.0)
    assert float(decomposer.step_statistics()["l0"]) == pytest.approx(4, rel=0.01)
    losses = [decomposer.loss(batch, 1.0)["kl"]]
    batch.x[torch.arange(batch.x.shape[1]) >= batch.length[:, None]] = 7
    losses.append(decomposer.loss(batch, 1.0)["kl"])
    torch.testing.assert_close(*losses)


def test_thresholds_are_calibrated_on_the_stream_that_was_trained_on(lm, tmp_path):
    target, source = lm
    decomposer = make("transcoder", target, train_on="cascading", steps=60, lr=1e-2, calibration=4096)
    train([Job(decomposer, tmp_path)], source, TrainConfig())
    batch = with_clean(source, source.batch("train", np.arange(64)), clean_points(decomposer))
    codes = replaced(decomposer.eval(), batch, decomposer.layers).codes
    real = torch.arange(1, batch.x.shape[1]) < batch.length[:, None]
    for site, found in codes.items():
        assert float(found.active.float().sum(-1)[real].mean()) == pytest.approx(4, rel=0.15), site


def test_a_regression_is_trained_on_its_squared_error(toy, tmp_path):
    target, source = toy
    decomposer = make("transcoder", target, train_on="cascading", steps=80, batch=256, lr=1e-2)
    lines: list[dict] = []
    train([Job(decomposer, tmp_path, lines.append)], source, TrainConfig(log_every=10))
    assert lines[-1]["mse"] < 0.7 * lines[0]["mse"]


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("transcoder", {"train_on": "clean", "activation": "matryoshka"}, "neither matryoshka nor multi_k"),
        ("clt", {"train_on": "single", "multi_k": 0.1}, "neither matryoshka nor multi_k"),
        ("clt", {"train_on": "clean", "across_layers": True}, "only train_on=local has"),
        ("sae", {"train_on": "clean"}, "unknown key 'train_on'"),
    ],
)
def test_what_end_to_end_training_cannot_have_is_refused(name, config, words, lm):
    with pytest.raises(UserError, match=words):
        make(name, lm[0], **config)


def test_end_to_end_training_has_defaults_of_its_own():
    kind = method("clt")
    assert [parse(kind.Config, {"train_on": mode}, "clt").batch for mode in ("local", "clean")] == [1024, 8]
    assert parse(kind.Config, {"train_on": "clean", "batch": 3}, "clt").batch == 3
