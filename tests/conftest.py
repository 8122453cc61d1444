"""Fixtures: a cache of its own, tiny language models with text, a toy. No test reaches a hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import pytest
import torch

from tests import typecheck

typecheck.install()  # before any import of the package


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing a test computes ends in the user's cache, except the corpus' extraction, which is slow and checked by hash."""
    from decomp_bench.data.cache import cache_dir

    extracted = list(cache_dir().glob("pydocs-*.json"))
    folder = tmp_path_factory.mktemp("cache")
    for file in extracted:
        (folder / file.name).symlink_to(file)
    os.environ["DECOMP_BENCH_CACHE"] = str(folder)
    torch.set_num_threads(1)


def tiny_tokenizer():
    """Every letter is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz .,\n"
    vocabulary = {"<|bos|>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|bos|>", pad_token="<|bos|>")


def save_tiny_model(folder: Path, shape: str, layers: int = 3) -> Path:
    """A randomly initialised two-head model of either shape, with weights large enough to matter, and its text, in one folder."""
    from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = ArceeForCausalLM(ArceeConfig(hidden_act="gelu_new", **sizes)) if shape == "arcee" else LlamaForCausalLM(LlamaConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = torch.ones_like(parameter) if "norm" in name else 0.3 * torch.randn(parameter.shape, generator=generator)
    words = ["the cat", "a dog", "runs", "sleeps", "on", "the mat", "and", "sings", "to", "a fox"]
    choose = torch.Generator().manual_seed(1)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(240):
            picked = torch.randint(len(words), (int(torch.randint(8, 24, (1,), generator=choose)),), generator=choose)
            file.write(json.dumps({"text": " ".join(words[i] for i in picked) + "."}) + "\n")
    _learn(model, tokenizer, (folder / "text.jsonl").read_text().splitlines())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _learn(model, tokenizer, lines: list[str], steps: int = 120) -> None:
    """Enough training that every MLP matters."""
    rows = [[0, *tokenizer(json.loads(line)["text"])["input_ids"]][:32] for line in lines]
    rows = torch.tensor([row for row in rows if len(row) == 32])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        x = rows[(16 * step) % (len(rows) - 16) :][:16]
        optimiser.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimiser.step()


@pytest.fixture(scope="session")
def tiny_arcee(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("arcee"), "arcee")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def lm(tiny_arcee: Path):
    """(target, source) of the tiny Arcee-shaped model."""
    return open_target(f"hf:{tiny_arcee}", str(tiny_arcee / "text.jsonl"))


@pytest.fixture(scope="session")
def gated_lm(tiny_llama: Path):
    """(target, source) of the tiny Llama-shaped model."""
    return open_target(f"hf:{tiny_llama}", str(tiny_llama / "text.jsonl"))


@pytest.fixture(scope="session")
def toy():
    """(target, source) of the two-layer residual MLP."""
    return open_target("toy:resid_mlp2", None)


def open_target(uri: str, data: str | None):
    from decomp_bench import data as data_module
    from decomp_bench import targets
    from decomp_bench.config import DataConfig

    target = targets.load(uri)
    return target, data_module.source(target, DataConfig(source=data))


@pytest.fixture(scope="session")
def stories():
    """(target, source) of the pretrained TinyStories model; skips where its folder is absent."""
    from decomp_bench.targets import NAMED, data_folder

    if not NAMED["stories260k"].path().is_dir():
        pytest.skip(f"no TinyStories model in {data_folder()}: set DECOMP_BENCH_DATA")
    return open_target("stories260k", None)
