"""Training and scoring on a pretended device: no operation sees tensors of two devices, and once a training is under way, no step waits for
the device except where that is named here. `test_device.py` runs these tests in a process of their own."""

from __future__ import annotations

import copy

import pytest
import torch

from decomp_bench import data
from decomp_bench.config import DataConfig, EvalConfig, TrainConfig
from decomp_bench.evaluate import evaluate
from decomp_bench.train import Job, train
from tests.contract.test_contract import make
from tests.pretended import NAME, pretend
from tests.test_device import FLOORS, there
from tests.test_precision import CASES

QUICK = {"clt", "molt", "sae", "spd", "vpd", "sae topk", "sae matryoshka"}
UNDER_WAY = slice(1, 4)
"""Steps after the first, which counts what a step takes, and before the snapshot at two thirds."""
WAITING = {
    "targets/base.py": "transformers looks at the positions that it is given",
    "methods/_end_to_end.py": "positions that count are chosen by index",
    "methods/saelens.py": "its own step",
}
RESTARTS = {"methods/_coder.py", "methods/_dictionary.py"}
"""Where dead components are looked for; here at every second step."""


@pytest.fixture
def waits(monkeypatch):
    """What the host waits for, while the pretended device is here."""
    with pretend(monkeypatch) as waits:
        yield waits


@pytest.fixture(params=["lm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gated_lm", "toy"))])
def world(request, monkeypatch):
    """(target and source on the pretended device, what the host waits for)"""
    target, source = request.getfixturevalue(request.param)
    target = copy.deepcopy(target)
    with pretend(monkeypatch) as waits:
        yield target.to(f"{NAME}:0"), data.source(target, DataConfig(source=source.config.source)), waits


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*CASES, *FLOORS)])
def test_every_method_is_trained_and_scored_there(name, world, tmp_path):
    target, source, waits = world
    decomposer, marks = there(name, target), []
    after_step = decomposer.after_step
    decomposer.after_step = lambda progress: (after_step(progress), marks.append(len(waits.found)))
    (outcome,) = train([Job(decomposer, tmp_path, lambda line: None)], source, TrainConfig(log_every=100, save_every=100))
    assert outcome.error is None
    assert {tensor.device.type for tensor in decomposer.state_dict().values()} <= {NAME}
    allowed = {*WAITING, *(RESTARTS if name == "transcoder resampled" else ())}
    for start, stop in zip(marks[UNDER_WAY], marks[UNDER_WAY.start + 1 : UNDER_WAY.stop + 1], strict=True):
        assert not [wait for wait in waits.found[start:stop] if wait.split(" at ")[1].split(":")[0] not in allowed]
    (scored,) = evaluate([decomposer.eval()], source, EvalConfig(tokens=120, bootstrap=10, batch=4, sweep=False))
    assert scored.rows


@pytest.mark.parametrize("activation", ["topk", "matryoshka", "batchtopk", "groupmax"])
def test_without_waits_the_losses_are_the_same(activation, lm, waits, tmp_path):
    """Elsewhere what is chosen keeps its size, zeros among it; that changes no loss and no weight."""
    found = []
    for target, source in (lm, (copy.deepcopy(lm[0]).to(f"{NAME}:0"), None)):
        source = source or data.source(target, DataConfig(source=lm[1].config.source))
        decomposer, lines = make("sae", target, activation=activation, steps=5), []
        train([Job(decomposer, tmp_path / target.device.type, lines.append)], source, TrainConfig(log_every=1))
        found.append(([line["loss"] for line in lines], {key: value.cpu() for key, value in decomposer.state_dict().items()}))
    (here, weights), (elsewhere, others) = found
    assert elsewhere == pytest.approx(here, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-3, atol=1e-4)


def test_what_is_mixed_is_refused_and_what_is_waited_for_is_seen(waits):
    ones = torch.ones(3, device=f"{NAME}:0")
    with pytest.raises(RuntimeError, match="same device"):
        ones + torch.ones(3)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=f"{NAME}:0", generator=torch.Generator())
    assert not waits.found
    assert float(ones.sum()) == 3
    assert ones[ones > 0].cpu().tolist() == [1, 1, 1]
    assert [found.split(" at ")[0] for found in waits.found] == ["_local_scalar_dense", "index by a mask", "_to_copy"]
