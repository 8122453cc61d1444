"""Controls keep what they should keep and destroy what they should destroy; the measurement puts them beside the run."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from decomp_bench import data, targets
from decomp_bench.config import DataConfig, EvalConfig, TrainConfig, parse
from decomp_bench.controls import freeze_decoder, of_shuffled_activations, on_random_target, shifted_gates, with_frozen_decoder
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.evaluate import evaluate
from decomp_bench.measurements import asked
from decomp_bench.metrics import CATALOGUE
from decomp_bench.registry import method
from decomp_bench.replacement import clean_codes, clean_points
from decomp_bench.results import unfolded
from decomp_bench.train import Job, train

SMALL = {
    "transcoder": {"features": 32, "k": 4, "steps": 40, "batch": 64, "calibration": 512, "activation": "batchtopk"},
    "spd": {"components": 20, "steps": 3, "batch": 2, "warmup_faith": 5, "init": "random", "gate_init": "random"},
    "neurons": {"k": 4},
}


def make(name, target, kind=None):
    made = kind or method(name)
    return made(parse(method(name).Config, SMALL[name], name), target, tuple(range(target.layers)), 0)


def batch_of(decomposer, source, rows=6):
    return with_clean(source, source.batch("test", np.arange(rows)), clean_points(decomposer))


def test_shifted_gates_keep_how_often_and_lose_when(lm):
    target, source = lm
    decomposer = make("neurons", target).eval()
    batch, view = batch_of(decomposer, source), shifted_gates(decomposer)
    kept = positions(batch, True)[:, 1:, None]
    own, shifted = clean_codes(decomposer, batch), clean_codes(view, batch)
    for name in own:
        before, after = own[name].gate * kept, shifted[name].gate * kept
        assert torch.equal(before.sum(1), after.sum(1))
        assert not torch.equal(before, after)
    again = view.encode({point: value[:, 1:] for point, value in batch.clean.items()}, own)
    assert all(torch.equal(again[name].gate, own[name].gate) for name in own)
    assert clean_codes(decomposer, batch).keys() == own.keys()
    one = clean_codes(view, batch_of(decomposer, source, 1))
    assert all(torch.allclose(one[name].gate[0], shifted[name].gate[0, : one[name].gate.shape[1]]) for name in own)


def test_shuffled_activations_keep_each_coordinate_and_the_padding(lm):
    target, source = lm
    decomposer = make("transcoder", target, of_shuffled_activations(method("transcoder")))
    batch = batch_of(decomposer, source)
    kept = positions(batch, True)
    shuffled = decomposer._shuffle(batch)  # type: ignore[operator]
    for point, value in batch.clean.items():
        before, after = value[kept], shuffled.clean[point][kept]
        assert torch.equal(before.sort(0).values, after.sort(0).values)
        assert not torch.equal(before, after)
        assert torch.equal(value[~kept], shuffled.clean[point][~kept])


@pytest.mark.parametrize("name", ["transcoder", "spd"])
def test_a_frozen_decoder_stays_where_it_is(lm, tmp_path, name):
    target, source = lm
    decomposer = make(name, target, with_frozen_decoder(method(name)))
    assert freeze_decoder(decomposer, source) > 0
    fixed = {parameter: parameter.detach().clone() for parameter in decomposer.fixed}  # type: ignore[union-attr]
    free = {key: value.clone() for key, value in decomposer.named_parameters() if value not in fixed}
    assert train([Job(decomposer, tmp_path)], source, TrainConfig(device="cpu"))[0].error is None
    assert all(torch.equal(parameter, value) for parameter, value in fixed.items())
    assert any(not torch.equal(dict(decomposer.named_parameters())[key], value) for key, value in free.items())


def test_a_random_target_has_the_same_entries_elsewhere(lm):
    target, source = lm
    other = on_random_target(source, 0)
    assert other.target.identity not in (target.identity, on_random_target(source, 1).target.identity)
    assert other.target.identity == on_random_target(source, 0).target.identity
    for (name, one), two in zip(target.module.named_parameters(), other.target.module.parameters(), strict=True):
        assert torch.equal(one.flatten().sort().values, two.flatten().sort().values)
        assert (one.dim() < 2) == torch.equal(one, two), name
    assert other.hash == source.hash


def test_the_measurement_puts_every_control_beside_the_run(lm, tmp_path):
    target, source = lm
    decomposer = make("transcoder", target)
    train([Job(decomposer, tmp_path)], source, TrainConfig(device="cpu"))
    (one,) = asked({"controls": {"tokens": 600, "bootstrap": 50}}, "test")
    told: list[tuple[int, int]] = []
    rows = one.measurement.measure(decomposer.eval(), source, one.settings, lambda done, parts: told.append((done, parts)))
    found = unfolded(pd.DataFrame(rows))
    assert set(found["control"]) == {"none", "shifted gates", "shuffled activations", "frozen decoder", "random target"}
    assert told[-1][0] == told[-1][1]
    fvu = dict(found[found["metric"] == "fvu"][["control", "value"]].itertuples(index=False, name=None))
    for control in ("shifted gates", "shuffled activations", "frozen decoder"):
        assert fvu[control] > fvu["none"]
    assert set(found["metric"]) <= set(CATALOGUE)
    assert set(found.loc[found["metric"] == "fvu", "better"]) == {"lower"}


def test_every_metric_tells_the_target_s_own_neurons_from_random_directions_or_says_what_it_is_blind_to():
    """All neurons are the target itself; random directions were never trained."""
    target = targets.load("pydocs-4l")
    source = data.source(target, DataConfig())
    config = EvalConfig(tokens=600, bootstrap=2, protocols=("cascading",), gates=("clean",), sweep=False)
    settings = {"neurons": {"k": max(target.weight("0.mlp.up").shape)}, "random_directions": {"features": 64, "k": 4}}
    kinds = {name: method(name) for name in settings}
    made = [kind(parse(kind.Config, settings[name], name), target, tuple(range(target.layers)), 0).eval() for name, kind in kinds.items()]
    truth, junk = ({row["metric"]: row["value"] for row in found.rows if row["layer"] == "all"} for found in evaluate(made, source, config))
    told = {
        key: truth[key] > junk[key] if metric.direction == "higher" else truth[key] < junk[key]
        for key, metric in CATALOGUE.items()
        if metric.direction != "none" and not metric.blind and math.isfinite(truth.get(key, math.nan))
    }
    assert told.keys() == {"kl", "agreement", "ce", "ce_recovered_mean", "fvu", "norm_mse", "fvu_trimmed"}
    assert [key for key, better in told.items() if not better] == []


def test_a_control_that_does_not_apply_says_why(lm):
    target, source = lm
    (one,) = asked({"controls": {"tokens": 300, "bootstrap": 20, "controls": ["shuffled activations", "frozen decoder"]}}, "test")
    rows = one.measurement.measure(make("neurons", target).eval(), source, one.settings, lambda _done, _parts: None)
    missing = [row for row in rows if "control=none" not in row["condition"]]
    assert {row["reason"] for row in missing} == {"nothing is trained"}
    assert all(math.isnan(row["value"]) for row in missing)
