"""Training of small language models: weights, optimisers, data order and the loop. On one thread it repeats bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ArceeConfig, ArceeForCausalLM, PreTrainedModel
from transformers.activations import NewGELUActivation

from decomp_bench.targets.muon import Muon
from decomp_bench.targets.rows import CONTEXT, Rows, batches

Progress = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides the corpus, the seed and the versions of the libraries.

    tokens: scored tokens seen in training; rows: rows of a batch; window: batches among which rows are sorted by length;
    muon_lr and lr: peak rates of the hidden matrices (Muon, Adam-matched scale; 0 gives them to AdamW) and of the rest
    (AdamW). The rate rises over the `warmup` share of `horizon` tokens, falls in a straight line that would reach zero at
    `horizon`, and from `cooldown` tokens on in a steeper one that reaches zero at `tokens`, where training ends. The training
    curve has `evaluations` points in a horizon, twice as dense from the cooldown on.
    """

    tokens: int = 10_407_232  # one pass over the training split
    horizon: int = 16_000_000
    cooldown: int = 4_600_000
    vocab: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 512
    context: int = CONTEXT
    max_position: int = 512
    rows: int = 16
    window: int = 64
    muon_lr: float = 0.02
    lr: float = 0.01
    weight_decay: float = 0.01
    warmup: float = 0.03
    clip: float = 1.0
    evaluations: int = 25
    evaluation_rows: int = 192
    checkpoint_seconds: int = 120
    threads: int = 1

    def key(self, seed: int, corpus: str) -> str:
        """12 hex digits that name a training: recipe, seed and corpus."""
        text = json.dumps([dataclasses.asdict(self), seed, corpus], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def arcee_config(recipe: Recipe, bos: int = 0, eos: int = 0, pad: int | None = 0) -> ArceeConfig:
    """The LlamaSimpleMLP of the parameter-decomposition papers as transformers knows it; the tokens are those of its tokenizer."""
    return ArceeConfig(
        vocab_size=recipe.vocab, hidden_size=recipe.hidden, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads, intermediate_size=recipe.intermediate, hidden_act="gelu_new", tie_word_embeddings=True,
        attention_bias=False, mlp_bias=False, max_position_embeddings=recipe.max_position,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip


def new_model(recipe: Recipe, seed: int) -> ArceeForCausalLM:
    """A LlamaSimpleMLP with freshly drawn weights."""
    model = ArceeForCausalLM(arcee_config(recipe)).float()
    draw(model, recipe.layers, seed)
    return model


@torch.no_grad()
def draw(model: PreTrainedModel, layers: int, seed: int) -> None:
    """Fresh weights: N(0, 0.02), the two projections into the residual stream narrower by sqrt(2 layers), norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        narrow = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
        std = 0.02 / math.sqrt(2 * layers) if narrow else 0.02
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head, with gradients formed chunk by chunk while the logits are still in the cache."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros(())
        for chunk in torch.arange(len(targets)).split(512):
            h, t = hidden[chunk], targets[chunk][:, None]
            logp = F.log_softmax(h @ weight.T, -1)
            total -= logp.gather(1, t).sum()
            delta = logp.exp_().scatter_add_(1, t, logp.new_full(t.shape, -1.0)).div_(len(targets))
            grad_hidden[chunk] = delta @ weight
            grad_weight.addmm_(delta.T, h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grads[0] * grad_hidden, grads[0] * grad_weight, None


def loss_of(model: PreTrainedModel, batch: Rows) -> Tensor:
    """Mean cross-entropy of the scored tokens of a batch, nats per token."""
    scored = batch.predicted()
    hidden = model.base_model(**batch.inputs()).last_hidden_state
    return _HeadLoss.apply(hidden[scored], model.get_output_embeddings().weight, batch.tokens[:, 1:][scored])  # type: ignore[return-value]


@torch.no_grad()
def cross_entropy(model: nn.Module, rows: Rows, size: int = 32) -> float:
    """Mean cross-entropy of a causal language model on the scored tokens of some rows, nats per token."""
    total = 0.0
    device = next(model.parameters()).device
    for batch in batches(rows, size):
        batch = batch.to(device)
        scored = batch.predicted()
        logits = model(**batch.inputs()).logits[scored]
        total += float(F.cross_entropy(logits.float(), batch.tokens[:, 1:][scored], reduction="sum").double())
    return total / rows.n_predicted


def plan(rows: Rows, tokens: int, recipe: Recipe, seed: int, most: int | None = None) -> list[Tensor]:
    """The row indices of every step: whole passes over shuffled rows, sorted by length inside a window, until `tokens` are seen.

    `most` is a number of steps at which it ends in any case.
    """
    generator = torch.Generator().manual_seed(1_000_003 + seed)  # not the stream that drew the weights
    steps: list[Tensor] = []
    seen = 0
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for window in order.split(recipe.rows * recipe.window):
            window = window[torch.argsort(rows.lengths[window], stable=True)]
            groups = window.split(recipe.rows)
            for i in torch.randperm(len(groups), generator=generator).tolist():
                steps.append(groups[i])
                seen += int((rows.lengths[groups[i]] - 1).sum())
                if seen >= tokens or len(steps) == most:
                    return steps


def rates(steps: int, horizon: int, cooldown: int, warmup: float) -> list[float]:
    """The share of the peak learning rate at each step; all arguments but `warmup` (a share of the horizon) count steps."""
    rise = max(1, round(warmup * horizon))
    share = [min((i + 1) / rise, (horizon - i) / max(1, horizon - rise)) for i in range(min(cooldown + 1, steps))]
    return share + [share[cooldown] * (steps - i) / (steps - cooldown) for i in range(len(share), steps)]


@dataclass(frozen=True)
class Schedule:
    """What each step does: the rows it takes, its share of the peak rates, and whether the model is evaluated after it."""

    rows: list[Tensor]
    rates: list[float]
    marks: set[int]

    @classmethod
    def of(cls, rows: Rows, recipe: Recipe, seed: int) -> Schedule:
        """The schedule of a recipe on some training rows."""
        steps = plan(rows, recipe.tokens, recipe, seed)
        horizon, cooldown = (len(plan(rows, tokens, recipe, seed)) for tokens in (recipe.horizon, recipe.cooldown))
        marks = {round(i * horizon / recipe.evaluations) for i in range(recipe.evaluations + 1)}
        marks |= {m for i in range(2 * recipe.evaluations) if (m := round(i * horizon / recipe.evaluations / 2)) >= cooldown}
        return cls(steps, rates(len(steps), horizon, cooldown, recipe.warmup), {*marks, len(steps)})

    @classmethod
    def of_steps(cls, rows: Rows, recipe: Recipe, seed: int, steps: int) -> Schedule:
        """So many steps, whatever tokens they see; the rate rises, then falls in a straight line to zero."""
        marks = {round(i * steps / recipe.evaluations) for i in range(1, recipe.evaluations + 1)}
        return cls(plan(rows, sys.maxsize, recipe, seed, steps), rates(steps, steps, steps, recipe.warmup), marks)


def optimisers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and AdamW for embedding and norms (for all where `muon_lr` is 0)."""
    inside = {n for n, p in model.named_parameters() if p.ndim == 2 and (".layers." in n or ".h." in n)}
    hidden = [p for n, p in model.named_parameters() if n in inside]
    rest = [p for n, p in model.named_parameters() if n not in inside]
    if not recipe.muon_lr:
        return [torch.optim.AdamW(hidden + rest, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)]
    muon = Muon(hidden, lr=recipe.muon_lr, weight_decay=recipe.weight_decay)
    return [muon, torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)]


@contextmanager
def _training_mode(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """One fused kernel for gelu_new (the same function) and the recipe's threads; both put back at the end."""
    threads = torch.get_num_threads()
    children = [(part, name, child) for part in model.modules() for name, child in part.named_children()]
    activations = [found for found in children if isinstance(found[2], NewGELUActivation)]
    torch.set_num_threads(recipe.threads)
    for part, name, _ in activations:
        setattr(part, name, nn.GELU(approximate="tanh"))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for part, name, activation in activations:
            setattr(part, name, activation)


def _checkpoint(path: Path, **state: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def fit(train: Rows, validation: Rows, recipe: Recipe, seed: int, checkpoint: Path, progress: Progress) -> tuple[ArceeForCausalLM, dict]:
    """Train a LlamaSimpleMLP by its recipe's schedule; returns the model and the record of `fit_model`."""
    model = new_model(recipe, seed)
    return model, fit_model(model, Schedule.of(train, recipe, seed), train, validation, recipe, checkpoint, progress)


def fit_model(
    model: PreTrainedModel, schedule: Schedule, train: Rows, validation: Rows, recipe: Recipe, checkpoint: Path, progress: Progress
) -> dict[str, Any]:
    """Train a model on the device that it is on; a checkpoint that is there is continued, to the same weights.

    Returns a record: curve (rows of step, tokens, train_loss, validation_ce), steps, tokens, seconds.
    """
    optims = optimisers(model, recipe)
    peaks = [[group["lr"] for group in o.param_groups] for o in optims]
    picked = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))[: recipe.evaluation_rows]
    sample = validation.take(picked.sort().values)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "curve": []}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=model.device)
        model.load_state_dict(state.pop("model"))
        for o, saved in zip(optims, state.pop("optims"), strict=True):
            o.load_state_dict(saved)
    with _training_mode(model, recipe):
        _loop(model, optims, peaks, schedule, train, sample, state, recipe, checkpoint, progress)
    return {**{k: state[k] for k in ("curve", "tokens", "seconds")}, "steps": len(schedule.rows)}


def _loop(
    model: PreTrainedModel, optims: list[torch.optim.Optimizer], peaks: list[list[float]], schedule: Schedule, train: Rows, sample: Rows,
    state: dict[str, Any], recipe: Recipe, checkpoint: Path, progress: Progress,
) -> None:  # fmt: skip
    began, saved, steps = time.perf_counter() - state["seconds"], time.perf_counter(), len(schedule.rows)
    if not state["curve"]:
        state["curve"].append([0, 0, math.log(recipe.vocab), cross_entropy(model, sample)])
    for step in range(state["step"], steps):
        batch = train.take(schedule.rows[step])
        loss = loss_of(model, batch.to(model.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for o, peak in zip(optims, peaks, strict=True):
            for group, lr in zip(o.param_groups, peak, strict=True):
                group["lr"] = lr * schedule.rates[step]
            o.step()
            o.zero_grad()
        recent = [*state.get("recent", [])[-99:], float(loss.detach())]
        state.update(step=step + 1, tokens=state["tokens"] + batch.n_predicted, seconds=time.perf_counter() - began, recent=recent)
        if step + 1 in schedule.marks:
            state["curve"].append([step + 1, state["tokens"], sum(recent) / len(recent), cross_entropy(model, sample)])
        info = {"loss": recent[-1], "tokens": state["tokens"], "seconds": state["seconds"], "validation_ce": state["curve"][-1][3]}
        progress(step + 1, steps, info)
        if time.perf_counter() - saved > recipe.checkpoint_seconds or step + 1 == steps:
            saved = time.perf_counter()
            _checkpoint(checkpoint, model=model.state_dict(), optims=[o.state_dict() for o in optims], **state)
