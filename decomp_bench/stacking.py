"""Runs that differ in their seed only, trained in one batched step: small targets cost operations, not arithmetic.

What a method offers for it is a `StackedLoss` (`Decomposer.stackable`, `Decomposer.stacked`). Each run keeps its folder, log lines, states,
checkpoints and watch. Its parameters, gradients and moments are slices of stacked ones, so that whatever reads or writes them, saving and
resuming among it, goes on as for a run alone. A run that diverges stays in its slice, which no other reads, and is no longer accounted for.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from decomp_bench.config import digest
from decomp_bench.decomposer import Batch
from decomp_bench.training import Training, learning_rate

WORTH_COMPILING = 12_000
"""Steps, those of all runs of a stack together, from which on the minute that compiling takes is soon won back."""
Terms = dict[str, Tensor]
Losses = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Tensor, Terms, Terms]]


@runtime_checkable
class StackedLoss(Protocol):
    """The losses of several decomposers of one config and target, computed together.

    The first dimension of weights, terms and statistics counts the decomposers. What it gives for
    one of them depends on that one's weights and inputs alone, and agrees with the decomposer's own `loss` up to rounding.
    """

    rows: Mapping[str, int]
    """Which dimension of an input differs from batch to batch."""

    def prepare(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Everything of a step that is not a function of the weights: rows chosen, random numbers drawn from each one's own generator."""
        ...

    def compute(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[Terms, Terms]:
        """Terms and step statistics, as `loss` and `step_statistics` name them, each [runs]: pure and differentiable in the weights, which
        bear the names of `named_parameters`, so that it can be compiled."""
        ...


def lanes(runs: Sequence[Training]) -> list[Training | Stacked]:
    """What advances at once: runs that differ in their seed only and stand at the same step together, others alone."""
    groups: dict[Any, list[Training]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(_alike(run) or place, []).append(run)
    made: list[Training | Stacked] = []
    for key, group in groups.items():
        size = group[0].decomposer.stackable()
        made += group if isinstance(key, int) else [Stacked(group[i : i + size]) for i in range(0, len(group), size)]
    return made


def _alike(run: Training) -> str | None:
    """The same for runs that can be stacked; None for one that cannot."""
    decomposer, config = run.decomposer, run.config
    if not decomposer.stackable() or config.accumulate > 1:
        return None
    return digest([decomposer.name, config.model_dump(mode="json"), decomposer.layers, id(decomposer.target), run.step], 32)


class Stacked:
    """Trainings that advance together."""

    def __init__(self, runs: list[Training]) -> None:
        self.runs, head = runs, runs[0]
        self.loss = type(head.decomposer).stacked([run.decomposer for run in runs])
        self._losses, self._tried = _losses_of(self.loss, self.runs[0]), False
        self.optimiser = _stacked_optimiser(runs)
        names = {id(parameter): name for name, parameter in head.decomposer.named_parameters()}
        pairs = zip(_parameters(head.optimiser), _parameters(self.optimiser), strict=True)
        self.weights = {names[id(own)]: stacked for own, stacked in pairs}

    @property
    def unfinished(self) -> bool:
        return any(run.unfinished for run in self.runs)

    @property
    def step(self) -> int:
        return max(run.step for run in self.runs)

    def advance(self) -> None:
        """One step of every run that has not failed."""
        began, step = time.perf_counter(), self.step
        active = [run for run in self.runs if run.unfinished]
        batch = active[0].streams.batch(active[0].decomposer, step)
        terms, statistics = self._optimise(batch, step)
        seconds = (time.perf_counter() - began) / len(active)
        for place, run in enumerate(self.runs):
            if run.unfinished:
                run.pending.append({name: values[place] for name, values in terms.items()})
                run.statistics = {name: values[place] for name, values in statistics.items()}
                run.flops_a_step = run.flops_a_step or active[0].flops_a_step
                run.took_a_step(batch, seconds)

    def _optimise(self, batch: Batch, step: int) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, tuple[Tensor, ...]]]:
        """Move the weights; gives the terms and statistics of each run."""
        head = self.runs[0]
        rate, progress = learning_rate(head.config, step), step / head.config.steps
        inputs = self.loss.prepare(batch, progress)
        self._try_compiling(inputs, head.config.steps - step)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak_lr"] * rate
        self.optimiser.zero_grad(set_to_none=True)
        total, terms, statistics = self._losses(self.weights, inputs)
        total.backward()
        logging = (step + 1) % head.train_config.log_every == 0 or step + 1 == head.config.steps
        for i, group in enumerate(self.optimiser.param_groups):
            if group["clip"] is not None or logging:
                norms = _clipped(group["params"], group["clip"])
                for run, norm in zip(self.runs, norms.unbind(), strict=True):
                    run.norms[i] = norm
        self.optimiser.step()
        for run in self.runs:
            run.decomposer.after_step(progress)
        return _apart(terms), _apart(statistics)

    def _try_compiling(self, inputs: Mapping[str, Tensor], steps: int) -> None:
        """Compile the loss where that is asked for or will pay, once, and stay with the plain one where it cannot be done here."""
        wanted, tried, self._tried = self.runs[0].train_config.compile, self._tried, True
        if tried or wanted == "off" or (wanted == "auto" and steps * len(self.runs) < WORTH_COMPILING):
            return
        import torch._dynamo  # takes seconds

        plain = self._losses
        for name, dimension in self.loss.rows.items():
            torch._dynamo.mark_dynamic(inputs[name], dimension)
        self._losses = torch.compile(plain, fullgraph=True, options={"compile_threads": 1})
        try:
            self._losses(self.weights, inputs)[0].backward()
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            warnings.warn(f"training goes on uncompiled ({type(error).__name__}: {text[0]}); it is slower", stacklevel=2)
            self._losses = plain


def _losses_of(loss: StackedLoss, head: Training) -> Losses:
    """A function of weights and inputs: the sum of all losses, and without gradients each run's terms, `loss` their sum, and statistics."""
    device, bf16 = head.device.type, head.bf16

    def losses(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, Terms, Terms]:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            terms, statistics = loss.compute(weights, inputs)
        total = torch.stack([term.float() for term in terms.values()]).sum(0)
        terms = {"loss": total, **terms}
        return total.sum(), {k: v.detach() for k, v in terms.items()}, {k: v.detach() for k, v in statistics.items()}

    return losses


def _apart(values: Terms) -> dict[str, tuple[Tensor, ...]]:
    return {name: value.unbind() for name, value in values.items()}


def _stacked_optimiser(runs: list[Training]) -> torch.optim.Optimizer:
    """One optimiser over the stacked parameters of all runs, whose own parameters and moments become slices of its."""
    head = runs[0].optimiser
    assert head is not None
    stacked = [_stack(list(same)) for same in zip(*(_parameters(run.optimiser) for run in runs), strict=True)]
    waiting, groups = iter(stacked), []
    for group in head.param_groups:
        groups.append({**group, "params": [next(waiting) for _ in group["params"]]})
    made = torch.optim.AdamW(groups)
    for place, parameter in enumerate(stacked):
        own = [_parameters(run.optimiser)[place] for run in runs]
        kept = [run.optimiser.state[one] for run, one in zip(runs, own, strict=True)]  # type: ignore[union-attr]
        made.state[parameter] = _stacked_state(parameter, kept)
        for i, state in enumerate(kept):
            state.update({key: value[i] if value.dim() else value for key, value in made.state[parameter].items()})
    return made


def _stack(own: list[nn.Parameter]) -> nn.Parameter:
    """Parameters as one, of which they become slices."""
    made = nn.Parameter(torch.stack([parameter.detach() for parameter in own]))
    for parameter, part in zip(own, made.detach().unbind(), strict=True):
        parameter.data = part
    return made


def _stacked_state(parameter: Tensor, kept: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Adam's state of a stacked parameter: of a resumed training, or of a new one."""
    if not kept[0]:
        count = torch.zeros((), device=parameter.device)
        return {"step": count, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return {key: torch.stack([state[key] for state in kept]) if value.dim() else value.clone() for key, value in kept[0].items()}


def _parameters(optimiser: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    assert optimiser is not None
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _clipped(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Norms [runs] of the gradients of each run, which are scaled down to the limit where there is one."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    if limit is not None:
        scale = (limit / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
    return norms
