"""Training at bf16 autocast, which is what a GPU does unasked: every method takes its steps, near those at full precision."""

from __future__ import annotations

import pytest
import torch

from decomp_bench import registry
from decomp_bench.config import TrainConfig
from decomp_bench.train import Job, train
from tests.contract.test_contract import make

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "groupmax")
CASES = {name: (name, {}) for name in registry.names() if registry.method(name).trainable}
CASES |= {f"sae {kind}": ("sae", {"activation": kind}) for kind in ACTIVATIONS}
CASES |= {
    "clt jumprelu": ("clt", {"activation": "jumprelu"}),
    "transcoder cascading": ("transcoder", {"train_on": "cascading"}),
    "transcoder resampled": ("transcoder", {"revive": "resample", "resample_every": 2, "dead_after": 50}),
    "spd of all maps": ("spd", {"subset": 0.0, "stochastic": 1.0, "layerwise": 1.0, "hidden": 0.1, "gate": "scalar"}),
    "spd of the paper": ("spd", {"sigmoid": "leaky", "delta": False, "ci_masked": 0.5, "gate": "vector_mlp", "init": "random"}),
    "spd of a transformer": ("spd", {"gate": "global_shared_transformer", "gate_width": 8, "gate_blocks": 1, "gate_heads": 2}),
    "vpd by rows": ("vpd", {"adversary": "fresh", "adversary_scope": "row", "adversary_routing": "subset"}),
}
for _method, _config in CASES.values():
    if "calibration" in registry.method(_method).Config.model_fields:
        _config["calibration"] = 64


@pytest.fixture(params=["here", "device"])
def rows(request, monkeypatch):
    """How positions are chosen: by index, as here, or by masks, as on another device."""
    if request.param == "device":
        monkeypatch.setattr("decomp_bench.methods._reconstruction.gathers", lambda device: False)
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("world", "near"), [("lm", 0.05), pytest.param("toy", 1.0, marks=pytest.mark.slow)])
def test_losses_at_bf16_are_near_those_at_full_precision(name, world, near, rows, request, tmp_path):
    method, config = CASES[name]
    if rows == "device" and method not in ("spd", "vpd"):
        pytest.skip("chooses no positions")
    target, source = request.getfixturevalue(world)  # a toy's error is as small as the rounding
    found = {}
    for precision in ("fp32", "bf16"):
        decomposer, lines = make(method, target, steps=6, **config), []
        (outcome,) = train([Job(decomposer, tmp_path / precision, lines.append)], source, TrainConfig(log_every=3, precision=precision))
        assert outcome.error is None
        assert {parameter.dtype for parameter in decomposer.parameters()} == {torch.float32}
        found[precision] = lines
    for line, exact in zip(found["bf16"], found["fp32"], strict=True):
        assert line.keys() == exact.keys()
    for place in (0, -1):
        assert found["bf16"][place]["loss"] == pytest.approx(found["fp32"][place]["loss"], rel=near)
