"""Text generated under an intervention: batched, with a key-value cache wherever codes at a position need that position alone."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from decomp_bench.conditions import upstream
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.intervene import Intervention, intervened, layers_of
from decomp_bench.replacement import clean_codes, clean_points, replaced

SHORTEST = 3
"""Positions with which it is tried whether codes depend on the position alone."""


@torch.no_grad()
def is_positionwise(decomposer: Decomposer, x: Int[Tensor, "B T"]) -> bool:
    """Whether the codes of a position are computed from that position alone, upstream of where they are used: tried on these tokens."""
    if not upstream(decomposer) or x.shape[1] < SHORTEST:
        return False
    target = decomposer.target
    clean, _ = target.clean(x, clean_points(decomposer), logits=False)
    whole = clean_codes(decomposer, Batch(x, clean=clean))
    first = int(target.keeps_first)
    alone = {point: torch.cat([value[:, :first], value[:, -1:]], 1) for point, value in clean.items()}
    last = clean_codes(decomposer, Batch(x[:, -1 - first :], clean=alone))
    return all(torch.allclose(last[name].value[:, -1], codes.value[:, -1], atol=1e-4, rtol=1e-3) for name, codes in whole.items())


@torch.no_grad()
def generate(
    decomposer: Decomposer,
    prompts: Int[Tensor, "n start"],
    length: int,
    intervention: Intervention | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    cached: bool | None = None,
) -> Int[Tensor, "n length"]:
    """Continuations of prompts that begin with the beginning-of-text token, under an intervention at every other position.

    Draw t of prompt i is the same uniform number whatever the intervention, so that two of them differ by their probabilities alone.
    Temperature 0 is greedy. Special tokens are never generated. `cached` None: where `is_positionwise`; False recomputes each prefix.
    """
    target = decomposer.target
    prompts = prompts.to(target.device)
    uniform = torch.rand(len(prompts), length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(target.device)
    cached = is_positionwise(decomposer, prompts) if cached is None else cached
    step = _Cached(decomposer, intervention) if cached else _Recomputed(decomposer, intervention)
    special = torch.tensor(sorted(set(target.tokenizer.all_special_ids)), device=target.device)
    rows = prompts
    for t in range(length):
        logits = step.logits(rows).float().index_fill(-1, special, -torch.inf)
        rows = torch.cat([rows, _drawn(logits, temperature, uniform[:, t : t + 1])], 1)
    return rows[:, prompts.shape[1] :]


def _drawn(logits: Tensor, temperature: float, uniform: Tensor) -> Int[Tensor, "n 1"]:
    """One token for each row, by inversion of the cumulated probabilities."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    cumulated = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).clamp_max(logits.shape[1] - 1)


class _Recomputed:
    """Next-token logits from the whole prefix."""

    def __init__(self, decomposer: Decomposer, intervention: Intervention | None) -> None:
        self.decomposer, self.intervention = decomposer, intervention

    def logits(self, rows: Int[Tensor, "n length"]) -> Tensor:
        target = self.decomposer.target
        if self.intervention is None:
            return target(rows)[:, -1]
        batch = Batch(rows)
        if not upstream(self.decomposer):  # gates then come from a clean pass over the same prefix
            batch.clean, _ = target.clean(rows, clean_points(self.decomposer), logits=False)
        return intervened(self.decomposer, batch, self.intervention).logits[:, -1]


class _Cached:
    """Next-token logits from the last token and the keys and values of those before it."""

    def __init__(self, decomposer: Decomposer, intervention: Intervention | None) -> None:
        self.decomposer, self.intervention = decomposer, intervention
        self.cache, self.seen = DynamicCache(), 0

    def _forward(self, x: Tensor) -> Tensor:
        return self.decomposer.target.module(input_ids=x, past_key_values=self.cache, use_cache=True).logits

    def logits(self, rows: Int[Tensor, "n length"]) -> Tensor:
        new, first = rows[:, self.seen :], int(self.seen == 0)
        self.seen = rows.shape[1]
        if self.intervention is None:
            return self._forward(new)[:, -1]
        layers = layers_of(self.decomposer, self.intervention)
        edit = self.intervention.edit
        out = replaced(self.decomposer, Batch(new), layers, edit=edit, keep_error=True, forward=self._forward, first=first)
        return out.logits[:, -1]


@torch.no_grad()
def continuation_nll(decomposer: Decomposer, prompts: Int[Tensor, "n start"], texts: Int[Tensor, "n length"]) -> Tensor:
    """Mean negative log-likelihood [n] of each continuation under the clean model, nats a token."""
    target = decomposer.target
    rows = torch.cat([prompts, texts], 1).to(target.device)
    logp = torch.log_softmax(target(rows)[:, prompts.shape[1] - 1 : -1].float(), -1)
    return -logp.gather(-1, rows[:, prompts.shape[1] :, None])[..., 0].mean(1)
