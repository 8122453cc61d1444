"""Training and scoring on a device other than the CPU: a pretended one, and a GPU where there is one."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decomp_bench import data, registry
from decomp_bench.config import DataConfig, EvalConfig, TrainConfig
from decomp_bench.evaluate import evaluate
from decomp_bench.train import Job, train
from tests.contract.test_contract import make
from tests.test_precision import CASES

FLOORS = {name: (name, {}) for name in registry.names() if not registry.method(name).trainable}
STEPS = 9
RUN = "import os, sys, pytest; code = pytest.main(sys.argv[1:]); sys.stdout.flush(); os._exit(code)"
"""Leaves at once: torch may abort on the way out where a device has a thread of its own."""


def there(name: str, target):
    """A method's decomposer of a target that is elsewhere."""
    method, config = (CASES | FLOORS)[name]
    if registry.method(method).trainable:
        config = {**config, "steps": STEPS, **({"batch": 2} if target.is_lm else {})}
    return make(method, target, **config)


@pytest.mark.parametrize("which", ["not slow and not gpu", pytest.param("slow", marks=pytest.mark.slow)])
def test_methods_on_a_pretended_device(which):
    """In a process of its own: a device has to be there before torch first goes backward, and would be there for all other tests."""
    options = ["-n0", "-q", "-p", "no:cacheprovider", "-m", which, "tests/elsewhere.py"]
    done = subprocess.run([sys.executable, "-c", RUN, *options], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("world_name", ["lm", "gated_lm", "toy"])
@pytest.mark.parametrize("name", [*CASES, *FLOORS])
def test_every_method_is_trained_and_scored_on_a_gpu(name, world_name, request, tmp_path):
    near, source = request.getfixturevalue(world_name)
    target = copy.deepcopy(near).to("cuda:0")
    source, decomposer = data.source(target, DataConfig(source=source.config.source)), there(name, target)
    (outcome,) = train([Job(decomposer, tmp_path, lambda line: None)], source, TrainConfig(log_every=3))
    assert outcome.error is None
    assert {tensor.device.type for tensor in decomposer.state_dict().values()} <= {"cuda"}
    (scored,) = evaluate([decomposer.eval()], source, EvalConfig(tokens=120, bootstrap=10, batch=4))
    assert scored.rows
