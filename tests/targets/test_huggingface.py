"""Loading language models: the right function, the right points, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from decomp_bench import targets
from decomp_bench.errors import UserError
from decomp_bench.targets import data_folder


@pytest.fixture(scope="module")
def story_rows(stories):
    """Each story as one row of at most 512 tokens, beginning-of-text first."""
    target, _ = stories
    lines = (data_folder() / "tinystories.jsonl").read_text().splitlines()
    encoded = target.tokenizer([json.loads(line)["text"] for line in lines], add_special_tokens=False)["input_ids"]
    return [torch.tensor([target.tokenizer.bos_token_id, *ids][:512]) for ids in encoded]


def cross_entropy(rows, logits_of) -> tuple[float, int]:
    total, count = 0.0, 0
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        x = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        with torch.no_grad():
            logp = torch.log_softmax(logits_of(x)[:, :-1], -1).gather(-1, x[:, 1:, None]).squeeze(-1)
        real = torch.arange(x.shape[1] - 1)[None] < torch.tensor([len(row) - 1 for row in part])[:, None]
        total, count = total - float(logp[real].double().sum()), count + int(real.sum())
    return total / count, count


@pytest.mark.slow
def test_cross_entropy_of_the_stories_model_on_all_stories(stories, story_rows):
    value, count = cross_entropy(story_rows, stories[0])
    assert count == 371_493
    assert value == pytest.approx(1.4484, abs=1e-4)


class _Zero(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_cross_entropy_of_the_stories_model_with_every_mlp_off(stories, story_rows):
    target, _ = stories

    def without(x):
        with target.swapped({target.path(f"{layer}.mlp"): _Zero() for layer in range(target.layers)}):
            return target(x)

    value, _ = cross_entropy(story_rows[:200], without)
    assert value == pytest.approx(8.229, abs=1e-3)


def test_greedy_text_of_the_stories_model(stories):
    target, _ = stories
    start = torch.tensor([[target.tokenizer.bos_token_id]])
    ids = target.module.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=90, do_sample=False)
    text = target.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )


@pytest.mark.parametrize("world", ["lm", "gated_lm"])
def test_points_are_where_they_say(world, request):
    target, source = request.getfixturevalue(world)
    x = source.batch("train", np.arange(2)).x
    names = {p for layer in range(target.layers) for p in target.maps(layer)} | {"1.mlp.in", "1.mlp.out", "1.resid", "1.attn.q"}
    found, logits = target.clean(x, names)
    mlp = target.part("1.mlp")
    assert torch.equal(mlp(found["1.mlp.in"]), found["1.mlp.out"])
    down = found["1.mlp.down"] @ target.weight("1.mlp.down").T
    assert torch.allclose(down, found["1.mlp.out"], atol=1e-6)
    assert torch.equal(target.module(input_ids=x).logits, logits)
    assert target.maps(0) == [f"0.mlp.{m}" for m in (("gate", "up", "down") if world == "gated_lm" else ("up", "down"))]


def test_identity_follows_the_weights(tiny_arcee, tmp_path):
    first, second = targets.load(f"hf:{tiny_arcee}"), targets.load(f"hf:{tiny_arcee}")
    assert first.identity == second.identity
    second.weight("0.mlp.up")[0, 0] += 1
    from decomp_bench.targets.base import identity_of

    assert identity_of(second.module) != first.identity


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("hf:/no/such/folder", "no folder"),
        ("hf:nobody/nothing", "without network give a local folder"),
        ("pydocs-5l", "did you mean 'pydocs-4l'"),
        ("toy:tms", "unknown toy"),
        ("llama-simple-mpl:folder", "did you mean 'llama-simple-mlp:FOLDER'.*hf:FOLDER, tl:FOLDER, llama-simple-mlp:FOLDER"),
    ],
)
def test_a_wrong_target_is_one_line_that_names_the_fix(uri, says):
    with pytest.raises(UserError, match=says) as error:
        targets.load(uri)
    assert "\n" not in str(error.value)


def test_a_broken_or_unsupported_folder_is_one_line(tiny_arcee, tmp_path):
    broken = shutil.copytree(tiny_arcee, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot load the model") as error:
        targets.load(f"hf:{broken}")
    assert "\n" not in str(error.value)
    other = shutil.copytree(tiny_arcee, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "olmo", "architectures": ["OlmoForCausalLM"]}))
    with pytest.raises(UserError, match="architecture 'olmo' is not known; name its module paths") as error:
        targets.load(f"hf:{other}")
    assert "\n" not in str(error.value)


def test_the_listing_names_every_scheme():
    schemes = {row["uri"].partition(":")[0] for row in targets.known() if ":" in row["uri"]}
    assert schemes == {"hf", "tl", "toy", *targets.SIMPLE}
    about = next(row["about"] for row in targets.known() if row["uri"].startswith("hf:"))
    assert "gpt_neox" in about


def test_a_layer_that_is_not_there(lm):
    with pytest.raises(UserError, match="layers 0 to 2"):
        lm[0].layer_tuple((0, 7))
