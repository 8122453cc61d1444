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

WORTH_COMPILING = 8000
"""Steps, those of all runs of a stack together, from which on the twenty seconds that compiling takes are won back."""
Terms = dict[str, Tensor]
Losses = Callable[[Sequence[Tensor], Mapping[str, Tensor]], tuple[Tensor, Terms, Terms]]


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

    def settle(self, weights: Mapping[str, Tensor]) -> None:
        """Called after each step of the optimiser with the weights as `compute` has them, which it may change in place."""
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
        self._losses, self._tried = _losses_of(self.loss, head), False
        self.optimiser = _stacked_optimiser(runs)
        self.weights = [group["params"][0] for group in self.optimiser.param_groups]
        self._views = _named(head)([weights.detach() for weights in self.weights])

    @property
    def unfinished(self) -> bool:
        return any(run.unfinished for run in self.runs)

    @property
    def step(self) -> int:
        return max(run.step for run in self.runs)

    def advance(self) -> None:
        """One step of every run that has not failed."""
        began, cpu, step = time.perf_counter(), time.process_time(), self.step
        active = [run for run in self.runs if run.unfinished]
        batch = active[0].streams.batch(active[0].decomposer, step)
        terms, statistics = self._optimise(batch, step)
        shares = (time.perf_counter() - began) / len(active), (time.process_time() - cpu) / len(active)
        for place, run in enumerate(self.runs):
            if run.unfinished:
                run.pending.append({name: values[place] for name, values in terms.items()})
                run.statistics = {name: values[place] for name, values in statistics.items()}
                run.flops_a_step = run.flops_a_step or active[0].flops_a_step
                run.took_a_step(batch, *shares)

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
                norms = _clipped(group["params"][0].grad, group["clip"])
                for run, norm in zip(self.runs, norms.unbind(), strict=True):
                    run.norms[i] = norm
        self.optimiser.step()
        self.loss.settle(self._views)
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
    device, bf16, named = head.device.type, head.bf16, _named(head)

    def losses(flat: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, Terms, Terms]:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            terms, statistics = loss.compute(named(flat), inputs)
        total = torch.stack([term.float() for term in terms.values()]).sum(0)
        terms = {"loss": total, **terms}
        return total.sum(), {k: v.detach() for k, v in terms.items()}, {k: v.detach() for k, v in statistics.items()}

    return losses


def _named(head: Training) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    """What gives the weights by name, each [runs, ...], of one tensor [runs, numbers] for each group."""
    names = {id(parameter): name for name, parameter in head.decomposer.named_parameters()}
    groups = [{names[id(one)]: one.shape for one in group["params"]} for group in _optimiser(head).param_groups]

    def named(flat: Sequence[Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for stacked, shapes in zip(flat, groups, strict=True):
            found |= dict(zip(shapes, _parts(stacked, list(shapes.values())), strict=True))
        return found

    return named


def _apart(values: Terms) -> dict[str, tuple[Tensor, ...]]:
    return {name: value.unbind() for name, value in values.items()}


def _stacked_optimiser(runs: list[Training]) -> torch.optim.Optimizer:
    """One optimiser over one parameter [runs, numbers] for each group, of which the runs' own parameters and moments become slices."""
    head, groups = _optimiser(runs[0]), []
    for i, group in enumerate(head.param_groups):
        own = [_optimiser(run).param_groups[i]["params"] for run in runs]
        groups.append({**group, "params": [nn.Parameter(torch.stack([_flat(parameters) for parameters in own]).detach())]})
    made = torch.optim.AdamW(groups)
    for i, group in enumerate(made.param_groups):
        (stacked,) = group["params"]
        states = [[_optimiser(run).state[one] for one in _optimiser(run).param_groups[i]["params"]] for run in runs]
        made.state[stacked] = _stacked_state(stacked, states)
        for place, run in enumerate(runs):
            parameters = _optimiser(run).param_groups[i]["params"]
            shapes = [parameter.shape for parameter in parameters]
            for parameter, part in zip(parameters, _parts(stacked.detach()[place], shapes), strict=True):
                parameter.data = part
            for key, value in made.state[stacked].items():
                parts = _parts(value[place], shapes) if value.dim() else [value] * len(shapes)
                for state, part in zip(states[place], parts, strict=True):
                    state[key] = part
    return made


def _stacked_state(stacked: Tensor, states: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Adam's state of a stacked parameter: that of resumed trainings, or a new one."""
    first = states[0][0]
    if not first:
        count = torch.zeros((), device=stacked.device)
        return {"step": count, "exp_avg": torch.zeros_like(stacked), "exp_avg_sq": torch.zeros_like(stacked)}
    moments = {key: torch.stack([_flat([state[key] for state in own]) for own in states]) for key, value in first.items() if value.dim()}
    return {key: moments[key] if value.dim() else value.clone() for key, value in first.items()}


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values])


def _parts(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Slices of [..., numbers] in these shapes."""
    pieces = flat.split([shape.numel() for shape in shapes], -1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _optimiser(run: Training) -> torch.optim.Optimizer:
    assert run.optimiser is not None
    return run.optimiser


def _clipped(gradient: Tensor, limit: float | None) -> Tensor:
    """Norms [runs] of the gradients [runs, numbers], which are scaled down to the limit where there is one."""
    norms = gradient.norm(dim=1)
    if limit is not None:
        gradient.mul_((limit / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms
