"""Coders whose components are divided over two processes take the steps of the undivided ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from decomp_bench.errors import UserError
from tests.methods.test_dictionary import batches, make

CASES = {
    "batchtopk": ("transcoder", {"activation": "batchtopk"}),
    "topk": ("sae", {"activation": "topk"}),
    "clt": ("clt", {"activation": "batchtopk", "skip": True, "multi_k": 0.125, "decoder_rows": "free"}),
    "own k": ("transcoder", {"activation": "topk", "k_by_layer": [2, 5]}),
}
STEPS = 4


def train(case: str, divided: bool) -> tuple[dict, list[float]]:
    """Some steps with dead components among the others, and the calibration; the state of the whole."""
    from decomp_bench.methods import _sharded

    name, config = CASES[case]
    decomposer, data = make(name, aux=1.0, aux_k=3, **config).train(), batches()
    for coder in decomposer.coders.values():
        coder.idle[5:9] = 10**9  # all in the first process' half
        coder.find_dead(10**6)
    if divided:
        _sharded.shard(decomposer)
    decomposer.before_training(data)
    optimiser = torch.optim.SGD(decomposer.parameter_groups(), lr=0.3)  # linear in the gradient, so that its size counts too
    losses = []
    for step in range(STEPS):
        terms = decomposer.loss(next(data), step / STEPS)
        losses += [float(value.detach()) for value in terms.values()]
        sum(terms.values()).backward()
        if divided:
            _sharded.clip(decomposer, 0.1)
        else:
            for group in decomposer.parameter_groups():
                torch.nn.utils.clip_grad_norm_(group["params"], 0.1)
        optimiser.step()
        optimiser.zero_grad()
        decomposer.after_step(step / STEPS)
    decomposer.finish(data)
    batch, decoded = next(data), {}
    with torch.no_grad():
        codes = decomposer.eval().encode(batch.clean)
        decoded = {f"decoded.{layer}": decomposer.decode(codes, f"{layer}.mlp.out", batch.clean) for layer in decomposer.layers}
    state = _sharded.whole_state(decomposer) if divided else decomposer.state_dict()
    return {**state, **decoded}, losses


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for case in CASES:
        state, losses = train(case, True)
        state["losses"] = torch.tensor(losses, dtype=torch.float64)
        save_file({name: value.contiguous() for name, value in state.items()}, f"{folder}/{case}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(case, divided):
    whole, losses = train(case, False)
    start = make(CASES[case][0], **CASES[case][1]).state_dict()
    moved = max(float((value - whole[name]).abs().max()) for name, value in start.items() if name.endswith("W_enc"))
    assert moved > 1e-3, "the steps do something"
    for rank in (0, 1):
        found = load_file(divided / f"{case}-{rank}.safetensors")
        torch.testing.assert_close(found.pop("losses"), torch.tensor(losses, dtype=torch.float64), atol=1e-6, rtol=1e-6)
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("config", [{"activation": "jumprelu"}, {"revive": "resample"}, {"train_on": "clean"}, {"stochastic": 1.0}])
def test_what_has_no_slices_is_refused(config, monkeypatch):
    from decomp_bench.methods import _sharded

    monkeypatch.setattr(dist, "get_rank", lambda _group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda _group: 2)
    with pytest.raises(UserError, match="divide over processes"):
        _sharded.shard(make("transcoder", **config))
    with pytest.raises(UserError, match="features=33 does not divide over 2 processes"):
        _sharded.shard(make("transcoder", features=33))
