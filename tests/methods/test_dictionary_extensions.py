"""Options of sparse coders that came after the first runs, and that leave what was there before as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from decomp_bench import runs
from decomp_bench.config import RunConfig
from decomp_bench.errors import UserError
from decomp_bench.registry import method
from tests.methods.test_dictionary import batches, fit, make
from tests.test_runs import MLP


@pytest.mark.parametrize("name", ["sae", "transcoder", "clt", "molt"])
def test_options_at_their_defaults_leave_no_trace_in_a_run_id(name, monkeypatch):
    """The hashed config is the one without these keys; set, they change the id."""
    monkeypatch.setattr("decomp_bench.metrics.metric_versions", dict)
    target = SimpleNamespace(uri="pydocs-4l", identity="identity", layer_tuple=lambda _layers: (0, 1), part=lambda _point: MLP)
    source = SimpleNamespace(name="pydocs", hash="hash")
    config = method(name).Config

    def key(**chosen):
        return runs.resolve(RunConfig(method=name, method_config=chosen), target, source).training_key  # type: ignore[arg-type]

    default = key()
    hashed = runs._hashed(RunConfig(method=name, method_config=config().model_dump(mode="json")), config)
    assert set(hashed["method_config"]) == set(config.model_fields) - set(config.younger)
    assert key(k_by_layer=[4, 8]) != default
    assert key(k_by_layer=None) == default


# ---- each layer's own k


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("name", ["transcoder", "clt"])
def test_each_layer_has_its_own_k_in_training_and_in_evaluation(name, activation):
    data = batches(rows=256)
    decomposer = make(name, activation=activation, k_by_layer=[2, 6], calibration=4096)
    fit(decomposer, data, steps=60)
    together = [next(data) for _ in range(8)]
    counts = torch.tensor([[float(c.active.float().sum(1).mean()) for c in decomposer.encode(b.clean).values()] for b in together])
    assert counts.mean(0).tolist() == pytest.approx([2, 6], rel=0.06)
    codes = decomposer._codes({s: decomposer.coder(s).normalise(together[0].clean[s.reads[0]]) for s in decomposer.sites}, None)[0]
    assert [float(code.fired().sum()) / 256 for code in codes.values()] == pytest.approx([2, 6], rel=0.02)
    assert decomposer.variant == "k=2/6"


def test_a_layer_with_its_own_k_has_the_weights_that_it_has_alone():
    both, alone = make("transcoder", k_by_layer=[2, 6]), make("transcoder", layers=(1,), k=6)
    for one in (both, alone):
        fit(one, batches(), steps=20)
    for name, value in alone.coders["1"].state_dict().items():
        assert torch.equal(value, both.coders["1"].state_dict()[name]), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"k_by_layer": [4]}, "1 values for 2 layers"),
        ({"k_by_layer": [4, 64]}, "k=64 exceeds features=32"),
        ({"k_by_layer": [4, 4], "activation": "relu"}, "k_by_layer is for"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make("transcoder", **config)
