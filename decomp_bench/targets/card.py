"""The model card of the embedded target, written from its training record."""

from __future__ import annotations

from typing import Any

LICENCES = {
    "python": "PSF-2.0",
    "datasets": "Apache-2.0",
    "huggingface_hub": "Apache-2.0",
    "jinja2": "BSD-3-Clause",
    "matplotlib": "Matplotlib licence (PSF-based)",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "pydantic": "MIT",
    "rich": "MIT",
    "sae-lens": "MIT",
    "scikit-learn": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "transformer-lens": "MIT",
    "transformers": "Apache-2.0",
    "wandb": "MIT",
}

TEMPLATE = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# {name}

A language model of Python documentation with {parameters:,} parameters: the embedded target of decomp-bench. It is small enough to be
decomposed in minutes on two cores and large enough to read like its texts. It is not meant to be used as a language model.

## Architecture
{layers} layers, width {hidden}, {heads} heads, GELU (tanh) MLP of {intermediate}, RMSNorm, rotary positions, tied embeddings, no biases,
{vocab} tokens, trained on rows of {context} tokens. A plain Hugging Face folder (`ArceeForCausalLM`, `hidden_act="gelu_new"`), which is
the LlamaSimpleMLP of the parameter-decomposition papers; weights are fp32.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

Input is `<|bos|>` (token 0) and up to {piece} tokens of one document. The tokenizer does not add `<|bos|>` by itself. A row never mixes
documents, padding is on the right, and the `<|bos|>` is not scored.

## Data
`pydocs`, corpus hash `{corpus_hash}`: docstrings of the standard library and of the packages below, and the texts of `pydoc_data.topics`,
read from the installed files. One document is the documentation of one file; splits go by a hash of the file's dotted name.

| split | documents | tokens |
|---|---:|---:|
{splits}

The texts belong to their authors, under these licences:

| source | version | licence |
|---|---|---|
{licences}

## Training
{tokens:,} tokens in {steps:,} steps of {rows} rows, {passes:.1f} passes over the training split; seed {seed}. Muon on the hidden
matrices (peak rate {muon_lr}), AdamW on embedding and norms ({lr}). The rate rises linearly over {warmup:.0%} of {horizon:,} tokens, falls
along a line that would reach zero at the end of these, and from {cooldown:,} tokens on along a steeper one that reaches zero where
training ends. Gradients are clipped at {clip}. fp32 on {threads} thread: with the versions in `training.json` the weights repeat bit
for bit. It took {minutes:.0f} minutes on one core of a busy machine. The curve is in `training_curve.csv`.

Made by `decomp-bench target train pydocs-4l{option}`.

## Cross-entropy, nats per token

| split | this model | bigram | unigram |
|---|---:|---:|---:|
{figures}

The unigram is add-one smoothed; the bigram backs off to it with alpha = {alpha:g}, the best on validation. Both are fitted on the
training split.
{stream}
## Samples

Greedy, from `{prompt}`:

{greedy}

At temperature 0.7, from the same words:

{sampled}

At temperature 0.7, from nothing:

{unprompted}
"""

STREAM = """
## Evaluation stream
`stream.uint16`: {rows:,} rows of {context} tokens (little-endian uint16), `<|bos|>` and {piece} tokens sampled from this model at
temperature 1, generator seed {seed}. There the expected difference in cross-entropy equals the KL divergence from this model.
Its own cross-entropy on the stream is {cross_entropy:.4f}, the mean entropy of its predictions {entropy:.4f}.
"""


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def card(record: dict[str, Any]) -> str:
    """The model card (Markdown) of a training record, as `training.json` holds it."""
    corpus, recipe, ce = record["corpus"], record["recipe"], record["cross_entropy"]
    splits = [f"| {split} | {s['documents']:,} | {s['tokens']:,} |" for split, s in corpus["splits"].items()]
    licences = [f"| {name} | {version} | {LICENCES.get(name, 'see the package')} |" for name, version in corpus["versions"].items()]
    figures = [f"| {split} | {v['model']:.3f} | {v['bigram']:.3f} | {v['unigram']:.3f} |" for split, v in ce.items()]
    piece = recipe["context"] - 1
    stream = STREAM.format(**record["stream"], context=recipe["context"], piece=piece) if record.get("stream") else ""
    return TEMPLATE.format(
        **{key: value for key, value in recipe.items() if key != "tokens"},
        **{key: _quoted(text) for key, text in record["samples"].items() if key != "prompt"},
        **{key: record[key] for key in ("name", "parameters", "tokens", "steps", "seed")},
        prompt=record["samples"]["prompt"],
        option=f" --seed {record['seed']}" if record["seed"] else "",
        piece=piece,
        corpus_hash=corpus["hash"],
        splits="\n".join(splits),
        licences="\n".join(licences),
        passes=record["tokens"] / max(1, corpus["splits"]["train"]["tokens"]),
        minutes=record["seconds"] / 60,
        figures="\n".join(figures),
        alpha=record["bigram_alpha"],
        stream=stream,
    )
