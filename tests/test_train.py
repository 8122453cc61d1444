"""Training: a run alone, in a group or resumed has the same weights; failures stay where they happen; signals lose nothing."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from decomp_bench import registry
from decomp_bench.config import MethodConfig, TrainConfig, parse
from decomp_bench.errors import UserError
from decomp_bench.train import Job, learning_rate, pick_device, train


def make(name, target, seed=0, **config):
    kind = registry.method(name)
    return kind(parse(kind.Config, {"steps": 20, "batch": 128, **config}, name), target, tuple(range(target.layers)), seed)


def test_a_group_gives_what_each_alone_gives(toy, tmp_path):
    target, source = toy
    group = [make("transcoder", target), make("sae", target, seed=1), make("spd", target, components=12)]
    train([Job(d, tmp_path / f"group{i}") for i, d in enumerate(group)], source, TrainConfig())
    alone = [make("transcoder", target), make("sae", target, seed=1), make("spd", target, components=12)]
    for i, decomposer in enumerate(alone):
        train([Job(decomposer, tmp_path / f"alone{i}")], source, TrainConfig())
    for first, second in zip(group, alone, strict=True):
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), (first.name, key)


def test_one_that_diverges_fails_with_a_reason_and_the_others_go_on(toy, tmp_path):
    target, source = toy
    good, bad = make("transcoder", target, steps=40), make("transcoder", target, steps=40)
    bad.loss = lambda batch, progress: {"broken": sum(p.sum() for p in bad.parameters()) * float("nan")}
    first, second = train([Job(good, tmp_path / "good"), Job(bad, tmp_path / "bad")], source, TrainConfig(log_every=10))
    assert first.error is None
    assert first.steps == 40
    assert second.error == "the loss 'broken' was nan at step 10: lower method.lr or the penalty"
    assert (tmp_path / "good" / "checkpoint" / "decomposer.safetensors").is_file()
    assert not (tmp_path / "bad" / "checkpoint").exists()


def test_accumulated_gradients_are_those_of_the_whole_batch(toy, tmp_path):
    target, source = toy
    once, parts = (
        make("transcoder", target, activation="topk", steps=5),
        make("transcoder", target, activation="topk", steps=5, accumulate=4),
    )
    train([Job(once, tmp_path / "once"), Job(parts, tmp_path / "parts")], source, TrainConfig())
    for key, value in once.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, parts.state_dict()[key], atol=1e-4), key
    with pytest.raises(UserError, match="does not divide"):
        train([Job(make("transcoder", target, accumulate=3), tmp_path / "x")], source, TrainConfig())


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_start_small_peak_at_one_and_end_where_they_say(schedule):
    config = MethodConfig(steps=100, warmup=9, schedule=schedule, decay_from=0.5, lr_end=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[49] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_a_device_that_is_not_here_is_one_line():
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no device 'cuda' here"):
            pick_device("cuda")


SCRIPT = """
import sys, pathlib, torch
from decomp_bench import registry, targets, data
from decomp_bench.config import DataConfig, TrainConfig, parse
from decomp_bench.train import Job, train
target = targets.load("toy:resid_mlp1")
source = data.source(target, DataConfig())
kind = registry.method("transcoder")
one = kind(parse(kind.Config, {"steps": 400, "batch": 128}, "x"), target, (0,), 0)
print("training", flush=True)
train([Job(one, pathlib.Path(sys.argv[1]))], source, TrainConfig(save_every=50), resume=sys.argv[2] == "resume")
"""


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    run = lambda folder, how: subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), how], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    whole = run(tmp_path / "whole", "start")
    killed = run(tmp_path / "killed", "start")
    assert killed.stdout is not None
    killed.stdout.readline()
    deadline = time.time() + 60
    while not (tmp_path / "killed" / "state" / "state.safetensors").exists() and killed.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGTERM)
    killed.wait(60)
    assert whole.wait(120) == 0
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / "checkpoint").exists()
    assert run(tmp_path / "killed", "resume").wait(120) == 0
    first, second = ((tmp_path / name / "checkpoint" / "decomposer.safetensors").read_bytes() for name in ("whole", "killed"))
    assert first == second


def test_a_resumed_run_counts_the_cpu_seconds_of_all_its_parts(toy, tmp_path, monkeypatch):
    target, source = toy
    clock = itertools.count()  # a second passes whenever somebody looks
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))
    config = TrainConfig(save_every=10, log_every=5)

    def interrupt(line):
        if line["step"] == 15:
            raise KeyboardInterrupt

    (whole,) = train([Job(make("transcoder", target), tmp_path / "whole")], source, config)
    assert whole.cpu_seconds == 1 + 20 + 1  # preparation, steps, end
    with pytest.raises(KeyboardInterrupt):
        train([Job(make("transcoder", target), tmp_path / "cut", interrupt)], source, config)
    (resumed,) = train([Job(make("transcoder", target), tmp_path / "cut")], source, config, resume=True)
    assert resumed.steps == whole.steps
    assert resumed.cpu_seconds == (1 + 10) + (1 + 10 + 1)
