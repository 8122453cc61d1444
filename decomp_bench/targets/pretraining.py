"""Pretraining of a target of your own: a LlamaSimpleMLP or a GPT-2 on any data that a data config names, as a Hugging Face folder."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from transformers import ArceeForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from decomp_bench.config import Config, DataConfig, digest
from decomp_bench.data.cache import cache_dir
from decomp_bench.data.corpus import Corpus, open_corpus
from decomp_bench.data.local import absolute
from decomp_bench.data.text import SPLITS, filled, special_ids
from decomp_bench.data.tokens import rows_of_corpus
from decomp_bench.errors import UserError
from decomp_bench.targets.huggingface import LONGEST_CONTEXT
from decomp_bench.targets.pydocs import LIBRARIES, publish, write_folder
from decomp_bench.targets.rows import Rows
from decomp_bench.targets.tokenizer import as_transformers, train_tokenizer
from decomp_bench.targets.training import Progress, Recipe, Schedule, arcee_config, cross_entropy, draw, fit_model

SHAPES = ("llama-simple-mlp", "gpt2")
TOKENIZER_CHARACTERS = 100_000_000
"""A tokenizer is trained on so much of the training split."""
SCORED_ROWS = 4096
"""Rows of a held-out split that the recorded cross-entropy is measured on; they come in random order."""


class ModelConfig(Config):
    """The sizes of a target."""

    layers: PositiveInt = 4
    width: PositiveInt = 128
    heads: PositiveInt | None = None
    """None: heads of 32, or one where the width is no multiple of that."""
    mlp: PositiveInt | None = None
    """Hidden units of an MLP. None: four times the width."""
    vocab: Annotated[int, Field(ge=257)] = 2048
    """Tokens of the tokenizer that is trained; a given tokenizer has its own."""
    context: Annotated[int, Field(ge=16)] = 256
    """Tokens in a row, and positions that the model knows."""


class PretrainingConfig(Config):
    """Everything that decides a target's weights, besides the seed and the versions of the libraries."""

    data: DataConfig = DataConfig()
    """`data.source` may be any that a run takes. Its `context` is the model's."""
    model: ModelConfig = ModelConfig()
    tokenizer: str | None = None
    """A tokenizer's folder or hub name. None: a byte-level BPE is trained on the training split."""
    steps: PositiveInt = 2000
    batch: PositiveInt = 16
    """Rows of one step."""
    muon_lr: Annotated[float, Field(ge=0)] = 0.02
    """Peak rate of the hidden matrices under Muon; 0 gives them to AdamW."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Peak rate of AdamW, for embeddings, norms and biases. For AdamW alone take about 1e-3."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps in which the rate rises; from there it falls in a straight line to zero."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    evaluations: PositiveInt = 20
    """Points of the training curve."""
    threads: PositiveInt = 1
    """CPU threads; on one, training repeats bit for bit."""


def pretrain(
    shape: str, config: PretrainingConfig, out: Path, seed: int = 0, *, work: Path | None = None, device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a target and write it to the folder `out`: model, tokenizer, card, curve and record; returns the record.

    `work` holds the state that a killed training continues from, to the same weights (default: a folder of the cache). Raises UserError
    for sizes, data or a tokenizer that do not fit.
    """
    say = progress or (lambda step, steps, info: None)
    _check(shape, config)
    corpus = open_corpus(config.data)
    kept = (work or cache_dir() / "targets").expanduser()
    say(0, config.steps, {"stage": "tokenising"})
    tokenizer = _tokenizer(config, corpus, kept)
    vocab = max(len(tokenizer), *(i + 1 for i in special_ids(tokenizer)))
    found = rows_of_corpus(corpus, tokenizer, config.model.context, config.data.packing, vocab)
    hashes = {split: filled(found[split], split).hash for split in SPLITS}
    separator = special_ids(tokenizer)[2] if config.data.packing == "confined" else None
    rows = {split: _as_tensors(found[split], separator) for split in SPLITS}
    _tell_repeats(config, corpus, rows["train"])
    recipe = _recipe(config, vocab)
    model = new_target(shape, recipe, tokenizer, seed).to(device)  # type: ignore[arg-type]
    schedule = Schedule.of_steps(rows["train"], recipe, seed, config.steps)
    decisive = config.model_dump(mode="json", exclude={"data", "tokenizer", "threads"})
    key = digest([shape, decisive, hashes, tokenizer.get_vocab(), seed, *([] if separator is None else [separator])], 12)
    fitted = fit_model(model, schedule, rows["train"], rows["validation"], recipe, kept / f"{shape}-{key}.pt", say)
    say(config.steps, config.steps, {"stage": "evaluating"})
    record = _record(shape, config, seed, model, rows, hashes, fitted)
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), model, tokenizer, record, fitted["curve"], card)
        publish(Path(name), out)
    return record


def new_target(shape: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A model of a shape with freshly drawn weights, which depend on the seed alone."""
    first, _, last = special_ids(tokenizer)
    if shape == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=recipe.vocab, n_positions=recipe.max_position, n_embd=recipe.hidden, n_layer=recipe.layers, n_head=recipe.heads,
                n_inner=recipe.intermediate, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=first, eos_token_id=last,
            )
        )  # fmt: skip
    else:  # without a padding token, whose embedding would get no gradient
        model = ArceeForCausalLM(arcee_config(recipe, first, last, None))
    model = model.float()
    draw(model, recipe.layers, seed)
    return model


def _check(shape: str, config: PretrainingConfig) -> None:
    if shape not in SHAPES:
        raise UserError(f"no recipe for a target of shape '{shape}'; there are {', '.join(SHAPES)}")
    if config.data.context is not None:
        raise UserError("data.context: the length of a row is that of the model here; set model.context")
    width, heads = config.model.width, _heads(config.model)
    if width % heads or (shape != "gpt2" and width // heads % 2):
        even = "" if shape == "gpt2" else " an even number of times"
        raise UserError(f"model.width={width} does not hold model.heads={heads}{even}: change one of them")


def _heads(model: ModelConfig) -> int:
    return model.heads or (model.width // 32 if model.width % 32 == 0 else 1)


def _recipe(config: PretrainingConfig, vocab: int) -> Recipe:
    sizes, tokens = config.model, config.steps * config.batch * (config.model.context - 1)
    return Recipe(
        tokens=tokens, horizon=tokens, cooldown=tokens, vocab=vocab, hidden=sizes.width, layers=sizes.layers, heads=_heads(sizes),
        intermediate=sizes.mlp or 4 * sizes.width, context=sizes.context, max_position=sizes.context, rows=config.batch,
        muon_lr=config.muon_lr, lr=config.lr, weight_decay=config.weight_decay, warmup=config.warmup, clip=config.clip,
        evaluations=config.evaluations, threads=config.threads,
    )  # fmt: skip


def _tokenizer(config: PretrainingConfig, corpus: Corpus, work: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that is given, or one trained on the text, which is kept for a training that goes on."""
    given = config.tokenizer
    if given is None and corpus.tokenised:
        raise UserError(f"'{corpus.name}' holds token ids: name the tokenizer that they are of, --set tokenizer=FOLDER-or-NAME")
    folder = work / f"tokenizer-{digest([corpus.key, config.model.vocab], 12)}"
    if given is None and not folder.is_dir():
        trained = as_transformers(train_tokenizer(_texts(corpus), config.model.vocab))
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as staged:
            trained.save_pretrained(Path(staged) / "made")
            os.rename(Path(staged) / "made", folder)
    where = str(folder) if given is None else absolute(given) if Path(given).expanduser().is_dir() else given
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the tokenizer '{given or folder}' ({reason}); give a folder with tokenizer files") from None


def _texts(corpus: Corpus) -> Iterator[str]:
    seen = 0
    for document in corpus.documents("train"):
        yield document.text
        seen += len(document.text)
        if seen >= TOKENIZER_CHARACTERS:
            return


def _as_tensors(rows: Any, separator: int | None) -> Rows:
    return Rows(torch.from_numpy(rows.tokens), torch.from_numpy(rows.length).long(), torch.from_numpy(rows.doc).long(), separator)


def _tell_repeats(config: PretrainingConfig, corpus: Corpus, train: Rows) -> None:
    passes = config.steps * config.batch / len(train)
    if passes > 1:
        said = f"{corpus.name}: {config.steps:,} steps go {passes:.1f} times over the {train.n_predicted:,} tokens of the train split"
        warnings.warn(said, stacklevel=2)


def _record(
    shape: str, config: PretrainingConfig, seed: int, model: PreTrainedModel, rows: dict[str, Rows], hashes: dict[str, str],
    fitted: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything that is known of a training, as `training.json` holds it."""
    vocab = model.config.vocab_size
    scored = {split: rows[split].head(SCORED_ROWS) for split in ("validation", "test")}
    return {
        "shape": shape,
        "config": config.model_dump(mode="json"),
        "command": _command(shape, config, seed),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": vocab,
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "machine": platform.machine(),
        "device": model.device.type,
        "corpus": {split: {"rows": len(r), "tokens": r.n_predicted, "hash": hashes[split]} for split, r in rows.items()},
        "steps": fitted["steps"],
        "tokens": fitted["tokens"],
        "seconds": round(fitted["seconds"], 1),
        "cross_entropy": {
            split: {"model": cross_entropy(model, r), "unigram": unigram(rows["train"], r, vocab), "uniform": math.log(vocab)}
            for split, r in scored.items()
        },
    }


def unigram(train: Rows, rows: Rows, vocab: int) -> float:
    """Cross-entropy of add-one smoothed token counts, nats per token: what a model must beat."""
    counts = torch.bincount(train.tokens[:, 1:][train.predicted()].long(), minlength=vocab).double() + 1
    return float(-(counts / counts.sum()).log()[rows.tokens[:, 1:][rows.predicted()].long()].mean())


def settings(config: Config) -> list[str]:
    """What differs from the defaults, as `--set` takes it."""
    found: list[str] = []
    for key, value in config:
        if isinstance(value, Config):
            found += [f"{key}.{item}" for item in settings(value)]
        elif value != type(config).model_fields[key].default:
            found.append(f"{key}={json.dumps(value) if isinstance(value, bool) else value}")
    return found


def _command(shape: str, config: PretrainingConfig, seed: int) -> str:
    return _with_settings(f"decomp-bench target train {shape} --seed {seed}", settings(config))


def _with_settings(command: str, items: list[str]) -> str:
    return " ".join([command, *(f"--set {shlex.quote(item)}" for item in items)])


CARD = """\
# {shape}, {parameters:,} parameters

{layers} layers, width {width}, {heads} heads, MLP of {mlp}, {vocabulary:,} tokens, rows of {context} tokens; a plain
Hugging Face folder in fp32.

Trained on `{source}` for {steps:,} steps, {tokens:,} tokens ({passes:.1f} passes over the training split), seed {seed}, by

    {command}

| split | this model | unigram | uniform |
|---|---:|---:|---:|
{figures}

Nats per token. The curve is in `training_curve.csv`, everything else in `training.json`. To decompose it on the same data:

    {use}
"""


def card(record: dict[str, Any]) -> str:
    """The model card (Markdown) of a training record."""
    config = PretrainingConfig.model_validate(record["config"])
    figures = [f"| {split} | {v['model']:.3f} | {v['unigram']:.3f} | {v['uniform']:.3f} |" for split, v in record["cross_entropy"].items()]
    sizes = {**config.model.model_dump(), "heads": _heads(config.model), "mlp": config.model.mlp or 4 * config.model.width}
    return CARD.format(
        **{key: record[key] for key in ("shape", "parameters", "vocabulary", "steps", "tokens", "seed", "command")},
        **{key: sizes[key] for key in ("layers", "width", "heads", "mlp", "context")},
        source=config.data.source or "pydocs",
        passes=record["tokens"] / max(1, record["corpus"]["train"]["tokens"]),
        figures="\n".join(figures),
        use=use_command("FOLDER", config, "train METHOD"),
    )


def use_command(folder: str, config: PretrainingConfig, verb: str) -> str:
    """A command that decomposes a target on the data that it was trained on."""
    context = config.model.context
    same = {"source": config.data.source or "pydocs", "context": context if context > LONGEST_CONTEXT else None}
    chosen = [f"data.{item}" for item in settings(config.data.model_copy(update=same))]
    return _with_settings(f"decomp-bench {verb} --target hf:{folder}", chosen)
