"""Training batches: pure functions of the step, the same cached or live."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decomp_bench.data import source as open_source
from decomp_bench.data.streams import BUDGET_VARIABLE, ActivationStream, SequenceStream, activation_folder
from decomp_bench.errors import UserError

POINTS = {"0.mlp.in", "1.mlp.out"}


def test_a_batch_depends_on_its_step_alone(lm):
    _, source = lm
    forward, backward = ActivationStream(source, POINTS, 64), ActivationStream(source, POINTS, 64)
    first = [forward.batch(i).clean["1.mlp.out"] for i in range(12)]
    for i in reversed(range(12)):
        assert torch.equal(backward.batch(i).clean["1.mlp.out"], first[i])
    sequences = SequenceStream(source, POINTS, 3)
    later = sequences.batch(7)
    assert torch.equal(SequenceStream(source, POINTS, 3).batch(7).x, later.x)


def test_cached_and_live_activations_are_the_same(lm, monkeypatch, tmp_path):
    _, source = lm
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path / "one"))
    made = ActivationStream(source, POINTS, 64).batch(2).clean["0.mlp.in"]
    assert list(activation_folder().rglob("*.safetensors"))
    cached = ActivationStream(source, POINTS, 64).batch(2).clean["0.mlp.in"]
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path / "two"))
    monkeypatch.setenv(BUDGET_VARIABLE, "0")
    live = ActivationStream(source, POINTS, 64).batch(2).clean["0.mlp.in"]
    assert not list(activation_folder().rglob("*.safetensors"))
    assert torch.equal(made, cached)
    assert torch.equal(made, live)


def test_a_broken_cache_file_is_harvested_again(lm, monkeypatch, tmp_path):
    _, source = lm
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path))
    made = ActivationStream(source, POINTS, 64).batch(0).clean["0.mlp.in"]
    for file in activation_folder().rglob("*.safetensors"):
        file.write_bytes(b"broken")
    assert torch.equal(made, ActivationStream(source, POINTS, 64).batch(0).clean["0.mlp.in"])


def test_rows_keep_their_points_together_and_leave_out_first_positions(lm):
    target, source = lm
    batch = ActivationStream(source, {"1.mlp.in", "1.mlp.out"}, 128).batch(1)
    again = target.part("1.mlp")(batch.clean["1.mlp.in"])
    assert torch.allclose(again, batch.clean["1.mlp.out"], atol=0.05, rtol=0.05)  # both are rounded to bf16
    x = source.batch("train", np.arange(4)).x
    first = target.clean(x, {"1.mlp.in"})[0]["1.mlp.in"][0, 0].bfloat16().float()
    assert not (batch.clean["1.mlp.in"] == first).all(-1).any()


def test_going_over_the_text_again_is_said_and_in_another_order(lm):
    _, source = lm
    stream = SequenceStream(source, POINTS, 16)
    tokens = int((source.rows("train").length - 1).sum())
    stream.batch(stream.per_epoch - 1)
    with pytest.warns(UserWarning, match=f"train split has {tokens:,} tokens, fewer than are asked for"):
        again = stream.batch(stream.per_epoch)
    assert not torch.equal(again.x, stream.batch(0).x)


def test_a_batch_larger_than_a_block_is_one_line(lm):
    with pytest.raises(UserError, match="make one smaller"):
        ActivationStream(lm[1], POINTS, 10**6).batch(0)


def test_int8_rows_are_half_the_bytes_and_as_near_as_their_scale_allows(lm, monkeypatch, tmp_path):
    target, source = lm
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path))
    exact = ActivationStream(source, POINTS, 64).batch(2).clean
    before = {path: path.stat().st_size for path in activation_folder().rglob("*.safetensors")}
    other = open_source(target, source.config.model_copy(update={"activations": "int8"}))
    made = [ActivationStream(other, POINTS, 64).batch(2).clean for _ in range(2)]
    for point, value in exact.items():
        assert torch.equal(made[0][point], made[1][point]), "made, then cached"
        step = value.abs().amax(1, keepdim=True) / 127
        assert ((made[0][point] - value).abs() <= 0.5001 * step).all()
        assert not torch.equal(made[0][point], value)
    added = {path: path.stat().st_size for path in activation_folder().rglob("*.safetensors") if path not in before}
    width = target.size("0.mlp.in")
    assert sum(added.values()) < sum(before.values()) * (width + 4) / (2 * width) + 2000, "with four bytes of scale a row"
