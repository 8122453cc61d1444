"""Targets of one's own: both shapes on any data, from the command line to a decomposed model, and the same after a kill."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decomp_bench import data, targets
from decomp_bench.cli import main
from decomp_bench.config import parse
from decomp_bench.errors import UserError
from decomp_bench.targets.pretraining import PretrainingConfig, pretrain, settings, use_command
from decomp_bench.targets.training import Recipe
from tests.conftest import tiny_tokenizer

WORDS = ["the cat", "a dog", "runs", "sleeps", "on the mat", "and sings", "to a fox", "by night"]
SIZES = {"layers": 2, "width": 32, "heads": 2, "context": 32, "vocab": 280}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set folder of 400 short texts, column `story`."""
    folder = tmp_path_factory.mktemp("stories")
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (14,), generator=generator)).capitalize() for _ in range(400)]
    pd.DataFrame({"story": texts}).to_parquet(folder / "train.parquet")
    return f"hf:{folder}"


def config(source: str, **more) -> PretrainingConfig:
    chosen = {"data": {"source": source, "column": "story", "lower": True}, "model": SIZES, "steps": 60, "batch": 8, "evaluations": 3}
    return parse(PretrainingConfig, {**chosen, **more}, "test")


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("shape", ["llama-simple-mlp", "gpt2"])
def test_a_target_learns_and_its_folder_is_what_was_trained(shape, text, tmp_path):
    record = pretrain(shape, config(text), tmp_path / "out", work=tmp_path / "work")
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == record
    figures = record["cross_entropy"]["test"]
    assert figures["model"] < figures["unigram"] - 0.3 < figures["uniform"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.model_type == {"llama-simple-mlp": "arcee", "gpt2": "gpt2"}[shape]
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    curve = (tmp_path / "out" / "training_curve.csv").read_text().splitlines()
    assert curve[0] == "step,tokens,train_loss,validation_ce"
    assert [int(line.split(",")[0]) for line in curve[1:]] == [0, 20, 40, 60]
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["command"] in card
    assert "--set data.lower=true" in card


def test_a_pretrained_target_is_decomposed_on_its_own_data(text, tmp_path):
    chosen = config(text)
    record = pretrain("llama-simple-mlp", chosen, tmp_path / "out", work=tmp_path / "work")
    target = targets.load(f"hf:{tmp_path / 'out'}")
    source = data.source(target, chosen.data)
    assert source.context == SIZES["context"]
    assert {split: source.rows(split).hash for split in ("train", "test")} == {s: record["corpus"][s]["hash"] for s in ("train", "test")}
    batch = source.batch("test", np.arange(source.size("test")))
    scored = torch.arange(1, batch.x.shape[1]) < batch.length[:, None]
    with torch.no_grad():
        logits = target(batch.x)[:, :-1][scored]
    found = float(torch.nn.functional.cross_entropy(logits, batch.x[:, 1:][scored]))
    assert found == pytest.approx(record["cross_entropy"]["test"]["model"], abs=1e-4)


@pytest.mark.parametrize("shape", ["llama-simple-mlp", "gpt2"])
def test_a_killed_training_goes_on_to_the_same_weights_bit_for_bit(shape, text, tmp_path, monkeypatch):
    monkeypatch.setattr("decomp_bench.targets.pretraining.Recipe", partial(Recipe, checkpoint_seconds=0))  # a state at every step
    chosen = config(text, steps=12)

    def stop(step: int, steps: int, info: dict) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(shape, chosen, tmp_path / "one", work=tmp_path / "work", progress=stop)
    assert not (tmp_path / "one").exists()
    steps: list[int] = []
    pretrain(shape, chosen, tmp_path / "one", work=tmp_path / "work", progress=lambda step, _steps, info: steps.append(step))
    assert 0 < min(step for step in steps if step) <= 8
    assert steps.count(3) == 0  # the first half was not done again
    pretrain(shape, chosen, tmp_path / "two", work=tmp_path / "other")
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("packing", ["packed", "confined"])
def test_a_given_tokenizer_packed_rows_and_adamw_alone(packing, text, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "letters")
    more = {"tokenizer": str(tmp_path / "letters"), "muon_lr": 0, "lr": 3e-3}
    packed = {"source": text, "column": "story", "lower": True, "packing": packing}
    record = pretrain("llama-simple-mlp", config(text, data=packed, **more), tmp_path / "out", work=tmp_path / "work")
    assert record["vocabulary"] == len(tiny_tokenizer())
    assert record["tokens"] == 60 * 8 * 31  # nothing is padded
    assert record["cross_entropy"]["test"]["model"] < record["cross_entropy"]["test"]["unigram"] - 0.3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(tiny_tokenizer())


def test_more_steps_than_text_is_said(text, tmp_path):
    with pytest.warns(UserWarning, match=r"2 steps go 2\.\d times over the [\d,]+ tokens of the train split"):
        pretrain("gpt2", config(text, steps=2, batch=800), tmp_path / "out", work=tmp_path / "work")


def test_settings_repeat_a_config():
    made = parse(PretrainingConfig, {"data": {"source": "a b.txt", "lower": True}, "model": {"context": 1024}}, "test")
    assert settings(made) == ["data.source=a b.txt", "data.lower=true", "model.context=1024"]
    assert use_command("F", made, "train METHOD") == (
        "decomp-bench train METHOD --target hf:F --set 'data.source=a b.txt' --set data.context=1024 --set data.lower=true"
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model": {**SIZES, "heads": 3}}, r"model\.width=32 does not hold model\.heads=3"),
        ({"tokenizer": "/no/such/folder"}, "cannot load the tokenizer '/no/such/folder'"),
        ({"data": {"source": "/no/such/file.txt"}}, "no data at"),
        ({"data": {"source": "x.txt", "context": 64}}, r"set model\.context"),
    ],
)
def test_what_does_not_fit_is_one_line(more, says, text, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        pretrain("llama-simple-mlp", config(text, **more), tmp_path / "out", work=tmp_path / "work")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["target", "train", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_line_trains_and_says_what_to_do_next(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [f"data.source={text}", "data.column=story", "steps=3", "batch=4", "model.layers=1", "model.width=16", "model.context=32"]
    chosen = [part for item in [*sets, "model.vocab=270"] for part in ("--set", item)]
    assert command("gpt2", "--out", "mine", "--device", "cpu", *chosen) == 0
    printed = capsys.readouterr().out
    assert f"next: decomp-bench train transcoder --target hf:mine --set data.source={text} --set data.column=story" in printed
    assert AutoModelForCausalLM.from_pretrained("mine").config.n_layer == 1
    for arguments, says in (
        (("gpt2", "--out", "mine"), "mine exists and is not empty"),
        (("gpt2", "--set", "steps=1,2"), "one value for each key"),
        (("gpt2", "--set", "model.depth=2"), "unknown key 'model.depth'"),
        (("pydocs-4l", "--set", "steps=2"), "pydocs-4l has a fixed recipe"),
        (("gpt3",), "no recipe for target 'gpt3'; did you mean 'gpt2'"),
    ):
        assert command(*arguments) == 2
        error = capsys.readouterr().err.strip()
        assert says in error
        assert "\n" not in error
