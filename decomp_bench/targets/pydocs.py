"""The embedded target `pydocs-4l`: tokenizer, training, figures, card and evaluation stream, start to end."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import ArceeForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from decomp_bench.data import pydocs
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.documents import Document
from decomp_bench.files import write_json, write_text
from decomp_bench.targets.card import card
from decomp_bench.targets.ngrams import NGrams
from decomp_bench.targets.rows import Rows, rows_of
from decomp_bench.targets.sampling import entropy, sample_stream, samples, stream_rows
from decomp_bench.targets.tokenizer import as_transformers, train_tokenizer
from decomp_bench.targets.training import Progress, Recipe, cross_entropy, fit

PROMPT = "Return the"
STREAM = "stream.uint16"
STREAM_TOKENS = 1_000_000
STREAM_SEED = 20
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
Corpus = Mapping[str, Sequence[Document]]  # split -> documents


def train_pydocs(
    out: Path, seed: int = 0, *, work: Path | None = None, progress: Progress | None = None, recipe: Recipe | None = None,
    corpus: Corpus | None = None, stream_tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the embedded target and write it to the folder `out`: model, tokenizer, card, curve, record and evaluation stream.

    `work` holds the checkpoint that a killed training continues from (default: a folder of the cache). `progress` is called with
    (step, steps, figures). `corpus` maps each split to its documents (default: pydocs). `stream_tokens` is the size of the
    evaluation stream (default: a million for seed 0, none for others). Returns the record that `training.json` holds.
    """
    recipe, say = recipe or Recipe(), progress or (lambda step, steps, info: None)
    corpus = corpus or {split: pydocs.documents(split) for split in pydocs.SPLITS}
    corpus_hash = pydocs.hash_of(chain.from_iterable(corpus.values()))
    stream_tokens = (0 if seed else STREAM_TOKENS) if stream_tokens is None else stream_tokens
    tokenizer = as_transformers(train_tokenizer((d.text for d in corpus["train"]), recipe.vocab))
    rows = {split: rows_of(list(corpus[split]), tokenizer, recipe.context) for split in pydocs.SPLITS}
    checkpoint = (work or cache_dir() / "targets") / f"{recipe.key(seed, corpus_hash)}.pt"
    model, fitted = fit(rows["train"], rows["validation"], recipe, seed, checkpoint, say)
    say(fitted["steps"], fitted["steps"], {"stage": "evaluating"})
    record = _record(model, tokenizer, rows, corpus, corpus_hash, recipe, seed, fitted)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        if stream_tokens:
            say(fitted["steps"], fitted["steps"], {"stage": "sampling the evaluation stream"})
            record["stream"] = write_stream(model, staged / STREAM, stream_tokens, recipe.context)
        write_folder(staged, model, tokenizer, record, fitted["curve"])
        publish(staged, out)
    return record


def _record(
    model: ArceeForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Mapping[str, Rows], corpus: Corpus, corpus_hash: str,
    recipe: Recipe, seed: int, fitted: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything that is known of a training, as `training.json` holds it."""
    ngrams = NGrams(rows["train"], recipe.vocab)
    alpha = ngrams.best_alpha(rows["validation"])
    figures = {
        split: {
            "model": cross_entropy(model, rows[split]),
            "bigram": ngrams.bigram(rows[split], alpha),
            "unigram": ngrams.unigram(rows[split]),
        }
        for split in ("validation", "test")
    }
    splits = {
        split: {
            "documents": len(corpus[split]),
            "characters": sum(len(d.text) for d in corpus[split]),
            "rows": len(r),
            "tokens": r.n_predicted,
        }
        for split, r in rows.items()
    }
    first = rows["validation"].head(32)
    return {
        "name": f"pydocs-4l@{seed}" if seed else "pydocs-4l",
        "command": f"decomp-bench target train pydocs-4l --seed {seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "machine": platform.machine(),
        "corpus": {"hash": corpus_hash, "versions": pydocs.versions(), "splits": splits},
        "steps": fitted["steps"],
        "tokens": fitted["tokens"],
        "seconds": round(fitted["seconds"], 1),
        "cross_entropy": figures,
        "bigram_alpha": alpha,
        "check": {"split": "validation", "rows": len(first), "cross_entropy": cross_entropy(model, first)},
        "samples": {"prompt": PROMPT, **samples(model, tokenizer, PROMPT, 160, seed)},
    }


def write_stream(model: ArceeForCausalLM, path: Path, tokens: int, context: int) -> dict[str, Any]:
    """Sample the evaluation stream of a model into a file; returns its figures."""
    stream = sample_stream(model, tokens, STREAM_SEED, context)
    stream.tofile(path)
    rows = stream_rows(stream)
    return {
        "seed": STREAM_SEED,
        "rows": len(stream),
        "tokens": int(stream.size),
        "sha256": hashlib.sha256(stream.tobytes()).hexdigest(),
        "cross_entropy": cross_entropy(model, rows),
        "entropy": entropy(model, rows),
    }


def write_folder(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], curve: Iterable[Sequence[float]],
    describe: Callable[[dict[str, Any]], str] = card,
) -> None:  # fmt: skip
    """Write a Hugging Face folder with card, record and training curve beside the model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with (folder / "training_curve.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "tokens", "train_loss", "validation_ce"])
        table.writerows([step, tokens, f"{loss:.5f}", f"{ce:.5f}"] for step, tokens, loss, ce in curve)
    write_json(record, folder / "training.json")
    write_text(describe(record), folder / "README.md")


def publish(staged: Path, out: Path) -> None:
    """Move finished files into a folder one by one, so that none is ever half-written there."""
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(staged.iterdir()):
        temporary = out / f".{file.name}.{os.getpid()}"
        shutil.copyfile(file, temporary)
        os.replace(temporary, out / file.name)
