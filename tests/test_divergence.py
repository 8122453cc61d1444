"""A training that breaks is stopped with the loss that broke, and one that merely moves is not."""

from __future__ import annotations

import math

import pytest
import torch

from decomp_bench.config import TrainConfig, parse
from decomp_bench.decomposer import Decomposer
from decomp_bench.divergence import PATIENCE, Watch
from decomp_bench.registry import method
from decomp_bench.train import LAST_GOOD, Job, train

TERMS = ("faith", "recon", "minimality")


def line(step: int, **changes: float) -> dict[str, float]:
    """A healthy log line of a run whose largest term by far is faith, but for some changes."""
    return {"step": step, "faith": 24.0, "recon": 0.23, "minimality": 0.4, "grad_norm_0": 0.01, "grad_norm_1": 0.16, "l0": 160.0, **changes}


def judged(lines: list[dict[str, float]]) -> list[str | None]:
    watch = Watch()
    return [watch.judge(one, TERMS) for one in lines]


def test_the_collapse_that_the_sum_of_losses_hides_is_named():
    """The published one: reconstruction from .23 to 3.15 and the gate's gradient from .16 to 57, while the sum rises by a tenth."""
    healthy = [line(20 * i, recon=0.23 + 0.05 * (-1) ** i * (i % 5 > 1)) for i in range(40)]
    found = judged(healthy + [line(800 + 20 * i, recon=3.15, grad_norm_1=57.0) for i in range(PATIENCE)])
    assert found[:-1] == [None] * (40 + PATIENCE - 1)
    assert found[-1] is not None
    assert "'recon' rose from 0.23 to 3.15" in found[-1]
    assert "norm from 0.16 to 57" in found[-1]
    dead = judged(healthy + [line(800 + 20 * i, recon=0.9, l0=9.0) for i in range(PATIENCE)])
    assert "L0 fell from 160 to 9" in (dead[-1] or "")
    healthy = [one | {"dead": 0.4} for one in healthy]
    dead = judged(healthy + [line(800 + 20 * i, recon=0.9, dead=0.97) for i in range(PATIENCE)])
    assert "live components fell from 60.0% to 3.0%" in (dead[-1] or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_norm_1": 57.0},  # a steep place alone
        {"recon": 3.15},  # a loss alone, as where its weight is annealed
        {"l0": 9.0},  # sparser, at no cost
        {"dead": 0.97},
        {"minimality": 6.0, "grad_norm_0": 0.05},
    ],
)
def test_what_moves_alone_is_no_collapse(changes):
    assert not any(judged([line(20 * i) for i in range(40)] + [line(800 + 20 * i, **changes) for i in range(40)]))


def test_a_term_that_revives_components_may_rise_but_not_without_end():
    """Measured: components die, the aux loss goes from a hundredth of the total to three quarters while the fit improves."""
    lines = [line(20 * i) for i in range(20)] + [line(400 + 20 * i, recon=0.2, minimality=6.0, grad_norm_1=57.0) for i in range(10)]
    watch, watch_all = Watch(["minimality"]), Watch()
    assert not any(watch.judge(one, TERMS) for one in lines)
    assert any(watch_all.judge(one, TERMS) for one in lines)
    assert "'minimality' was nan" in (watch.judge(line(900, minimality=float("nan")), TERMS) or "")


def test_a_moment_is_no_collapse_and_a_start_is_not_judged():
    spike = [line(20 * i, recon=9.0, grad_norm_1=90.0) if i % 20 == 19 else line(20 * i) for i in range(100)]
    assert not any(judged(spike))
    falling = [line(i, recon=100.0 / (i + 1), faith=1e-9 * 10**i, grad_norm_0=1e-6 * 10**i) for i in range(9)]
    assert not any(judged(falling))


def test_the_loss_that_is_not_finite_is_named_at_once():
    assert judged([line(0), line(20, recon=math.inf)]) == [None, "the loss 'recon' was inf at step 20: lower method.lr or the penalty"]


def test_the_last_good_weights_are_kept_and_a_log_has_the_norms(toy, tmp_path):
    """A training that is healthy up to a step, after which one of its losses is not finite."""
    target, source = toy
    kind = method("transcoder")
    made = kind(parse(kind.Config, {"features": 24, "steps": 60, "batch": 64}, "test"), target, (0, 1), 0)
    healthy, kept, lines = made.loss, [], []

    def loss(batch, progress):
        if progress == 0.5:
            kept.append({name: value.clone() for name, value in made.state_dict().items()})
        return {**healthy(batch, progress), "late": torch.zeros(()) if progress <= 0.5 else torch.full((), math.nan)}

    made.loss = loss
    (outcome,) = train([Job(made, tmp_path, lines.append)], source, TrainConfig(log_every=6, save_every=30))
    assert outcome.error == f"the loss 'late' was nan at step 36: lower method.lr or the penalty; the last good weights are in {LAST_GOOD}"
    assert all(one["grad_norm_0"] > 0 for one in lines)
    assert not (tmp_path / "checkpoint").exists()
    good = Decomposer.load(tmp_path / LAST_GOOD, target)
    assert all(torch.equal(value, kept[0][name]) for name, value in good.state_dict().items())
