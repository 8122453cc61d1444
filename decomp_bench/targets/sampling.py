"""Text sampled from the embedded target, and the fixed evaluation stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StaticCache

from decomp_bench.targets.rows import CONTEXT, Rows


@torch.no_grad()
def generate(model: nn.Module, start: Tensor, length: int, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Continue rows of tokens [n, k] to [n, length]; temperature 0 is greedy. BOS (token 0) is never generated."""
    rows = [start]
    cache, step = StaticCache(config=model.config, max_cache_len=length), start  # type: ignore[attr-defined]
    for _ in range(length - start.shape[1]):
        logits = model(step, past_key_values=cache, use_cache=True).logits[:, -1].float()
        logits[:, 0] = -torch.inf
        step = _drawn(F.softmax(logits / temperature, -1), generator) if temperature else logits.argmax(-1, keepdim=True)
        rows.append(step)
    return torch.cat(rows, 1)


def _drawn(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw [n, 1] from each row of probabilities [n, vocab], by inversion; token 0 has none and is not drawn."""
    cumulated = p.double().cumsum(-1)
    u = torch.rand(len(p), 1, generator=generator, dtype=torch.float64)
    return torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True).clamp(1, p.shape[1] - 1)


def sample_stream(model: nn.Module, tokens: int, seed: int, context: int = CONTEXT, batch: int = 256) -> np.ndarray:
    """At least `tokens` tokens sampled from a model at temperature 1: uint16 [rows, context], each row BOS and its continuation.

    On these rows the expected rise of the cross-entropy of a changed model is its KL divergence from this one.
    """
    generator = torch.Generator().manual_seed(seed)
    missing = -(-tokens // context)
    parts = []
    while missing > 0:
        start = torch.zeros(min(batch, missing), 1, dtype=torch.int64)
        parts.append(generate(model, start, context, 1.0, generator).numpy().astype("<u2"))
        missing -= len(start)
    return np.concatenate(parts)


def read_stream(path: Path, context: int = CONTEXT) -> np.ndarray:
    """The evaluation stream of a file as uint16 [rows, context], memory-mapped."""
    return np.memmap(path, dtype="<u2", mode="r").reshape(-1, context)


def stream_rows(stream: np.ndarray) -> Rows:
    """Rows of a stream in the form that training and scoring take; every row is a document of its own."""
    tokens = torch.from_numpy(stream.astype(np.int64))
    return Rows(tokens, torch.full((len(tokens),), tokens.shape[1]), torch.arange(len(tokens)))


@torch.no_grad()
def entropy(model: nn.Module, rows: Rows, size: int = 32) -> float:
    """Mean entropy of a model's predictions at the scored positions of full rows, nats per token."""
    total = 0.0
    for batch in rows.tokens.split(size):
        logp = F.log_softmax(model(batch[:, :-1], use_cache=False).logits.float(), -1)
        total -= float((logp.exp() * logp).sum().double())
    return total / rows.n_predicted


def samples(model: nn.Module, tokenizer: Any, prompt: str, length: int, seed: int) -> dict[str, str]:
    """A greedy continuation of a prompt, the same at T = 0.7, and a text at T = 0.7 from nothing."""
    bos = torch.zeros(1, 1, dtype=torch.int64)
    start = torch.cat([bos, torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)], dtype=torch.int64)], 1)
    generator = torch.Generator().manual_seed(seed)
    texts = {
        "greedy": generate(model, start, length, 0.0),
        "sampled": generate(model, start, length, 0.7, generator),
        "unprompted": generate(model, bos, length, 0.7, generator),
    }
    return {name: tokenizer.decode(ids[0, 1:]) for name, ids in texts.items()}
