"""Several seeds of SPD in one batched step: the losses and gradients of each alone, and the same training."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from decomp_bench import data
from decomp_bench.config import DataConfig, TrainConfig, parse
from decomp_bench.methods._spd_stack import StackedSPD
from decomp_bench.methods.spd import SPD, SPDConfig
from decomp_bench.train import Job, train
from tests.methods.test_spd import a_batch
from tests.targets.test_toys import recorded

OPTIONS = {"init": "random", "gate": "scalar", "gate_hidden": (6,), "components": 12, "stochastic": 1.0, "layerwise": 0.7, "subset": 0.0,
           "faithfulness": 2.0, "importance": 0.1, "warmup_faith": 3, "batch": 32, "steps": 30}  # fmt: skip


def a_toy(identity: bool = False):
    target = recorded(4, identity)
    return target, data.source(target, DataConfig())


def members(target, count: int = 3, **config) -> list[SPD]:
    chosen = parse(SPDConfig, {**OPTIONS, **config}, "spd")
    return [SPD(chosen, target, tuple(range(target.layers)), seed) for seed in range(count)]


def draw_alike(stack: StackedSPD, alone: SPD, stacked: SPD) -> None:
    """Let both draw the same numbers: those of a step at once, and one by one in the order of the losses."""
    drawn: list[torch.Tensor] = []

    def whole(numbers: int, rows: int, device) -> torch.Tensor:
        uniforms = torch.rand(numbers, rows, generator=torch.Generator().manual_seed(alone.seed))
        for places in stack.passes.values():
            for place in places.values():
                drawn.append(uniforms[place].T)
                drawn.extend([uniforms[place.stop]] if alone.config.delta else [])
        return uniforms

    stacked.uniforms.draw = whole
    alone.uniforms.draw = lambda *shape, device: drawn.pop(0) if shape[0] else torch.empty(shape)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"collapse": True, "penalty": "lp", "p": 1.0, "gate_bias": 0.0},
        {"penalty": "lp", "p": 2.0, "p_end": 0.5, "beta": 0.3, "sigmoid": "leaky", "delta": False, "gate_hidden": (5, 4)},
        {"layerwise": 0.0, "gamma_end": None, "gate_hidden": ()},
    ],
)
def test_each_one_s_losses_statistics_and_gradients_are_its_own(config):
    target, source = a_toy(identity=True)
    alone, stacked = members(target, **config), members(target, **config)
    batch, progress = a_batch(alone[0], source, range(32)), 0.4
    stack = StackedSPD(stacked)
    for one, other in zip(alone, stacked, strict=True):
        draw_alike(stack, one, other)
    weights = {name: torch.stack([dict(one.named_parameters())[name].detach() for one in stacked]).requires_grad_()
               for name, _ in stacked[0].named_parameters()}  # fmt: skip
    terms, statistics = stack.compute(weights, stack.prepare(batch, progress))
    sum(terms.values()).sum().backward()
    for i, one in enumerate(alone):
        expected = one.loss(batch, progress)
        sum(expected.values()).backward()
        assert list(terms) == list(expected)
        assert statistics.keys() == one.step_statistics().keys()
        for name, value in {**expected, **one.step_statistics()}.items():
            torch.testing.assert_close({**terms, **statistics}[name][i], value, rtol=1e-4, atol=1e-7)
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(weights[name].grad[i], parameter.grad, rtol=1e-3, atol=1e-6)


def test_what_is_not_computed_together_is_trained_alone(lm):
    target, _ = a_toy()
    for config in ({"subset": 1.0}, {"gate": "shared"}, {"samples": 2}, {"adversarial": 0.5}):
        assert members(target, 1, **config)[0].stackable() == 0
    assert members(lm[0], 1)[0].stackable() == 0
    assert members(target, 1)[0].stackable() > 5


def test_what_is_tied_is_moved_by_both_of_its_uses_as_it_is_in_one_memory():
    target, source = a_toy(identity=True)
    options = {"tied": True, "init": "aligned", "sigmoid": "leaky", "delta": False}
    alone, stacked = members(target, **options), members(target, **options)
    stack = StackedSPD(stacked)
    weights = {name: torch.stack([dict(one.named_parameters())[name].detach() for one in stacked]).requires_grad_()
               for name, _ in stacked[0].named_parameters()}  # fmt: skip
    optimisers = [torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0) for parameters in (
        list(weights.values()), *(list(one.parameters()) for one in alone))]  # fmt: skip
    for step in range(3):
        batch = a_batch(alone[0], source, range(32 * step, 32 * step + 32))
        for optimiser in optimisers:
            optimiser.zero_grad()
        for one, other in zip(alone, stacked, strict=True):
            draw_alike(stack, one, other)
        terms, _ = stack.compute(weights, stack.prepare(batch, 0.1))
        sum(terms.values()).sum().backward()
        for one in alone:
            sum(one.loss(batch, 0.1).values()).backward()
        for optimiser in optimisers:
            optimiser.step()
        stack.settle(weights)
    for i, one in enumerate(alone):
        assert torch.equal(one.parts["0_mlp_down"].U, one.parts["0_mlp_up"].V.T)
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(weights[name][i], parameter, rtol=1e-3, atol=1e-4)


def test_a_run_in_a_group_gives_what_it_gives_alone(tmp_path):
    target, source = a_toy()
    group = members(target, collapse=True, clip=0.01)
    lines: list[list[dict]] = [[], [], []]
    outcomes = train([Job(d, tmp_path / f"g{i}", lines[i].append) for i, d in enumerate(group)], source, TrainConfig(log_every=10))
    for i, one in enumerate(members(target, collapse=True, clip=0.01)):
        own: list[dict] = []
        (outcome,) = train([Job(one, tmp_path / f"a{i}", own.append)], source, TrainConfig(log_every=10))
        assert (outcome.steps, outcome.tokens, outcome.flops) == (outcomes[i].steps, outcomes[i].tokens, outcomes[i].flops)
        assert [line["step"] for line in lines[i]] == [10, 20, 30]
        for line, expected in zip(lines[i], own, strict=True):
            assert line.keys() == expected.keys()
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert line["grad_norm_0"] == pytest.approx(expected["grad_norm_0"], rel=1e-3)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(group[i].state_dict()[name], value, rtol=1e-3, atol=1e-4)
        assert (tmp_path / f"g{i}" / "checkpoint" / "decomposer.safetensors").is_file()
    assert not torch.equal(group[0].parts["0_mlp_up"].V, group[1].parts["0_mlp_up"].V)


def test_one_that_diverges_leaves_the_others_as_they_are(tmp_path):
    target, source = a_toy()
    good, sick, also = members(target)
    with torch.no_grad():
        sick.parts["0_mlp_up"].V.fill_(float("nan"))
    first, second, third = train([Job(d, tmp_path / d_name) for d, d_name in ((good, "good"), (sick, "sick"), (also, "also"))], source,
                                 TrainConfig(log_every=10))  # fmt: skip
    assert second.error is not None
    assert second.error.startswith("the loss 'faithfulness' was nan at step 10")
    assert second.steps == 10
    assert first.error is third.error is None
    assert not (tmp_path / "sick" / "checkpoint").exists()
    one = members(target, 1)[0]
    train([Job(one, tmp_path / "alone")], source, TrainConfig(log_every=10))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(good.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_a_stopped_group_goes_on_to_the_same_weights_bit_for_bit(tmp_path):
    target, source = a_toy()
    whole, stopped, resumed = members(target), members(target), members(target)
    train([Job(d, tmp_path / f"whole{i}") for i, d in enumerate(whole)], source, TrainConfig())

    def interrupt(event: dict) -> None:
        if event["step"] >= 16:
            os.kill(os.getpid(), signal.SIGINT)

    jobs = lambda found: [Job(d, tmp_path / f"stopped{i}") for i, d in enumerate(found)]
    with pytest.raises(KeyboardInterrupt):
        train(jobs(stopped), source, TrainConfig(log_every=8), interrupt)
    assert not (tmp_path / "stopped0" / "checkpoint").exists()
    outcomes = train(jobs(resumed), source, TrainConfig(log_every=8), resume=True)
    assert [outcome.steps for outcome in outcomes] == [30, 30, 30]
    for one, other in zip(whole, resumed, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_where_nothing_compiles_training_goes_on_with_a_word(tmp_path, monkeypatch):
    def broken(*_args, **_settings):
        raise RuntimeError("no compiler\nhere")

    target, source = a_toy()
    monkeypatch.setattr(torch, "compile", lambda *_args, **_settings: broken)
    (one,) = members(target, 1, steps=3)
    with pytest.warns(UserWarning, match="uncompiled \\(RuntimeError: no compiler\\)"):
        (outcome,) = train([Job(one, tmp_path)], source, TrainConfig(compile="on"))
    assert outcome.steps == 3


COMPILED = """
import pathlib, sys, torch
from decomp_bench import data, registry, targets
from decomp_bench.config import DataConfig, TrainConfig, parse
from decomp_bench.train import Job, train
target = targets.load("toy:resid_mlp1")
source = data.source(target, DataConfig())
kind, found = registry.method("spd"), {}
options = {"init": "random", "gate": "scalar", "gate_hidden": (6,), "components": 12, "stochastic": 1.0, "layerwise": 1.0, "subset": 0.0,
           "batch": 32, "steps": 12, "collapse": True, "warmup_faith": 3}
for how in ("on", "off"):
    found[how] = [kind(parse(kind.Config, options, "x"), target, (0,), seed) for seed in range(2)]
    folder = pathlib.Path(sys.argv[1]) / how
    train([Job(d, folder / str(i)) for i, d in enumerate(found[how])], source, TrainConfig(compile=how))
for one, other in zip(found["on"], found["off"]):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4)
print("alike")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_steps_are_those_that_are_not(tmp_path):
    """In a process of its own: shapes are not checked inside what is compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "alike", done.stderr[-2000:]
    assert "uncompiled" not in done.stderr
