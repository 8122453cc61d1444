"""One decomposer in training: its optimiser, its steps, its log lines, and its state on disk.

Data batches are pure functions of the step and every decomposer draws from its own generator. Statistics stay on the device and are
read at log steps only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from decomp_bench.checkpoint import write_tensors
from decomp_bench.config import MethodConfig, TrainConfig
from decomp_bench.data.sources import Source
from decomp_bench.data.streams import ActivationStream, SequenceStream, iterate
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.divergence import NORM, Watch, gradient_norm
from decomp_bench.errors import UserError
from decomp_bench.flops import counted
from decomp_bench.replacement import clean_points

CHECKPOINT, SNAPSHOT, STATE, LAST_GOOD = "checkpoint", "checkpoint_two_thirds", "state", "checkpoint_last_good"


@dataclass
class Job:
    """One decomposer to train, the run folder that takes its states and checkpoints, and where its log lines go."""

    decomposer: Decomposer
    folder: Path
    log: Callable[[dict[str, Any]], None] = lambda _line: None


@dataclass
class Outcome:
    """What training came to: steps and rows or positions seen, seconds of its steps, CPU-seconds of those and of what precedes and follows
    them, FLOPs of its own products, and what went wrong. A resumed run goes on from what its state had counted."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: float = 0.0
    error: str | None = None


def learning_rate(config: MethodConfig, step: int) -> float:
    """Multiplier of the peak rate at a step: linear warm-up, flat, then the decay of the schedule down to `lr_end`."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "constant":
        return warm
    start, quarter = config.decay_from * config.steps, config.schedule == "quarter_cosine"
    done = min(1.0, max(0.0, (step - start) / max(1.0, config.steps - start - quarter)))
    half = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    shape = math.cos(math.pi / 2 * done) if quarter else half
    return warm * (config.lr_end + (1 - config.lr_end) * shape)


class Streams:
    """The batches of each step, computed once for all decomposers that want the same ones."""

    def __init__(self, source: Source, decomposers: list[Decomposer]) -> None:
        self.source = source
        self._made: dict[tuple[str, int], ActivationStream | SequenceStream] = {}
        self._last: dict[tuple[str, int], tuple[int, Batch]] = {}
        self._points: dict[str, set[str]] = {"activations": set(), "sequences": set()}
        for decomposer in decomposers:
            units = {f"{layer}.mlp.{end}" for layer in decomposer.layers for end in ("in", "out")}
            wanted = clean_points(decomposer) if decomposer.trains_on == "sequences" else units | decomposer.points()
            self._points[decomposer.trains_on] |= wanted

    def stream(self, decomposer: Decomposer) -> ActivationStream | SequenceStream:
        """The stream that a decomposer trains on."""
        key = (decomposer.trains_on, decomposer.config.batch)
        if key not in self._made:
            kind = ActivationStream if key[0] == "activations" else SequenceStream
            self._made[key] = kind(self.source, self._points[key[0]], key[1])
        return self._made[key]

    def batch(self, decomposer: Decomposer, step: int) -> Batch:
        """The batch of a step."""
        key = (decomposer.trains_on, decomposer.config.batch)
        if self._last.get(key, (-1, None))[0] != step:
            self._last[key] = (step, self.stream(decomposer).batch(step))
        return self._last[key][1]


class Training:
    """One decomposer in training: its optimiser, step count and state on disk."""

    def __init__(self, job: Job, streams: Streams, config: TrainConfig, device: torch.device) -> None:
        self.job, self.streams, self.train_config = job, streams, config
        self.decomposer = job.decomposer.to(device).train()
        self.config = job.decomposer.config
        self.step, self.outcome, self.last = 0, Outcome(), {}
        self.optimiser: torch.optim.Optimizer | None = None
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda" and self.decomposer.target.is_lm)
        self.device = device
        self.pending: list[dict[str, Tensor]] = []
        """Terms of the steps since the last log line."""
        self.norms: dict[int, Tensor] = {}
        """Gradient norms of the last step by parameter group, before clipping, where they are known."""
        self.statistics: dict[str, Tensor] = {}
        """Those of the last step, where the decomposer itself does not have them."""
        self._watch = Watch(self.decomposer.on_demand)
        self.flops_a_step = 0.0
        self._positions: list[int | Tensor] = []
        """Positions of the steps that `outcome` does not count yet: looking at their number at each step would wait for the device."""

    @property
    def unfinished(self) -> bool:
        return self.outcome.error is None and self.step < self.config.steps

    # ---- phases

    def start(self, resume: bool) -> None:
        """Resume from the saved state, or prepare the decomposer; a run without steps is finished and saved at once."""
        began, resume = time.process_time(), resume and self._state_file().is_file()
        if self.config.steps and not resume:
            self.decomposer.before_training(iterate(self.streams.stream(self.decomposer)))
        self._make_optimiser()
        if resume:
            self._load_state()
        self.outcome.cpu_seconds += time.process_time() - began
        if self.config.steps == 0:
            self._finish()

    @property
    def runs(self) -> list[Training]:
        """Itself alone: what several that advance together are to the loop."""
        return [self]

    def advance(self) -> None:
        """One step."""
        began, cpu = time.perf_counter(), time.process_time()
        batch = self.streams.batch(self.decomposer, self.step)
        self._optimise(batch)
        self.took_a_step(batch, time.perf_counter() - began, time.process_time() - cpu)

    def took_a_step(self, batch: Batch, seconds: float, cpu_seconds: float) -> None:
        """Account for a step that the weights have made; at its marks a log line, a state, the two-thirds snapshot, and the end."""
        self._positions.append(_positions(batch))
        self.step += 1
        self.outcome.steps = self.step
        self.outcome.seconds += seconds
        self.outcome.cpu_seconds += cpu_seconds
        self.flops_a_step = self.flops_a_step or _flops(clone(self.decomposer).train(), batch)
        self.outcome.flops += self.flops_a_step
        if self.step % self.train_config.log_every == 0 or self.step == self.config.steps:
            self._log()
        if self.outcome.error is not None:
            return
        if self.step == math.ceil(self.config.steps * 2 / 3) and self.step < self.config.steps:
            self._snapshot()
        if self.step == self.config.steps:
            self._finish()
        elif self.step % self.train_config.save_every == 0 and not self._watch.suspicious:
            self.save_state()

    def _optimise(self, batch: Batch) -> None:
        assert self.optimiser is not None
        rate, progress = learning_rate(self.config, self.step), self.step / self.config.steps
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak_lr"] * rate
        self.optimiser.zero_grad(set_to_none=True)
        for part in _parts(batch, self.config.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                terms = self.decomposer.loss(part, progress)
            total = torch.stack([term.float() for term in terms.values()]).sum()
            (total / self.config.accumulate).backward()
        for i, group in enumerate(self.optimiser.param_groups):
            if group["clip"] is not None:
                self.norms[i] = torch.nn.utils.clip_grad_norm_(group["params"], group["clip"])
        self.optimiser.step()
        self.decomposer.after_step(progress)
        for parameter, rows in self.decomposer.restarted():
            for moment in self.optimiser.state[parameter].values():
                if moment.shape == parameter.shape:
                    moment[rows] = 0
        self.pending.append({"loss": total.detach(), **{k: v.detach() for k, v in terms.items()}})

    def _count_positions(self) -> None:
        self.outcome.tokens += sum(int(count) for count in self._positions)
        self._positions = []

    def _log(self) -> None:
        """Read the steps since the last line, all at once, and judge whether the run is still finite."""
        assert self.optimiser is not None
        keys = dict.fromkeys(key for terms in self.pending for key in terms)  # a term need not be there at every step
        line = {key: float(torch.stack([terms[key] for terms in self.pending if key in terms]).float().mean()) for key in keys}
        line |= {key: float(value) for key, value in {**self.decomposer.step_statistics(), **self.statistics}.items()}
        self.pending = []
        for i, group in enumerate(self.optimiser.param_groups):  # of the last step, before clipping
            line[f"{NORM}{i}"] = float(self.norms[i] if i in self.norms else gradient_norm(group["params"]))
        self._count_positions()
        line |= {
            "step": self.step,
            "lr": self.config.lr * learning_rate(self.config, self.step - 1),
            "tokens": self.outcome.tokens,
            "seconds": round(self.outcome.seconds, 3),
            "tokens_per_s": round(self.outcome.tokens / max(self.outcome.seconds, 1e-9), 1),
        }
        self.last = line
        self.job.log(line)
        reason = self._watch.judge(line, [*(key for key in keys if key != "loss"), "loss"])
        if reason:
            self.outcome.error = reason + self._keep_last_good()

    def _keep_last_good(self) -> str:
        """Save the weights of the last resume state, which was taken while all was well, as a checkpoint; says so."""
        if not self._state_file().is_file():
            return ""
        copy = clone(self.decomposer)
        tensors = load_file(self._state_file(), device=str(self.device))
        copy.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("weights/")})
        copy.eval().save(self.job.folder / LAST_GOOD)
        return f"; the last good weights are in {LAST_GOOD}"

    def _snapshot(self) -> None:
        copy = clone(self.decomposer)
        copy.finish(iterate(self.streams.stream(self.decomposer), self.step))
        copy.eval().save(self.job.folder / SNAPSHOT)

    def _finish(self) -> None:
        began = time.process_time()
        self.decomposer.finish(iterate(self.streams.stream(self.decomposer), self.step))
        self.outcome.cpu_seconds += time.process_time() - began
        broken = [name for name, value in self.decomposer.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            self.outcome.error = f"weights are not finite after training ({', '.join(broken[:3])}): lower method.lr"
            return
        self.decomposer.eval().save(self.job.folder / CHECKPOINT)
        self._state_file().unlink(missing_ok=True)

    # ---- optimiser and state

    def _make_optimiser(self) -> None:
        groups = []
        for group in self.decomposer.parameter_groups():
            if group["params"]:
                groups.append({"clip": self.config.clip, **group, "peak_lr": group.get("lr", self.config.lr)})
        fused = self.device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.AdamW(groups, lr=self.config.lr, weight_decay=0.0, fused=fused) if groups else None

    def _state_file(self) -> Path:
        return self.job.folder / STATE / "state.safetensors"

    def save_state(self) -> None:
        """Everything that the next step depends on, as one safetensors file."""
        assert self.optimiser is not None
        self._count_positions()
        tensors = {f"weights/{k}": v for k, v in self.decomposer.state_dict().items()}
        tensors |= {f"own/{k}": v for k, v in self.decomposer.train_state().items()}
        for index, parameter in enumerate(self._parameters()):
            tensors |= {f"optimiser/{index}/{key}": value for key, value in self.optimiser.state[parameter].items()}
        outcome = {k: str(v) for k, v in vars(self.outcome).items() if k != "error"}
        write_tensors(tensors, self._state_file(), {"step": str(self.step), **outcome})

    def _load_state(self) -> None:
        from safetensors import safe_open

        try:
            tensors = load_file(self._state_file(), device=str(self.device))
            with safe_open(self._state_file(), "pt") as opened:
                about = opened.metadata()
            seconds, cpu_seconds, flops = (float(about[key]) for key in ("seconds", "cpu_seconds", "flops"))
            self.decomposer.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("weights/")})
        except Exception as error:
            raise UserError(f"{self._state_file()} is broken ({type(error).__name__}): train again with --existing overwrite") from None
        self.decomposer.load_train_state(
            {k[4:]: v.cpu() if v.dtype == torch.uint8 else v for k, v in tensors.items() if k.startswith("own/")}
        )
        assert self.optimiser is not None
        for index, parameter in enumerate(self._parameters()):
            prefix = f"optimiser/{index}/"
            kept = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            self.optimiser.state[parameter] = {k: _laid_out_as(v, parameter) for k, v in kept.items()}
        self.step = int(about["step"])
        self.outcome = Outcome(self.step, int(about["tokens"]), seconds, cpu_seconds, flops)

    def _parameters(self) -> list[torch.nn.Parameter]:
        assert self.optimiser is not None
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]


def _laid_out_as(value: Tensor, parameter: Tensor) -> Tensor:
    """A saved moment in its parameter's memory layout, which the fused optimiser takes for granted and a file does not keep."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def clone(decomposer: Decomposer) -> Decomposer:
    """A copy with its own weights and the same target."""
    copy = type(decomposer)(decomposer.config, decomposer.target, decomposer.layers, decomposer.seed)
    copy.to(decomposer.target.device).load_state_dict(decomposer.state_dict())
    return copy


def _flops(decomposer: Decomposer, batch: Batch) -> float:
    """FLOPs of one step's products, counted on a copy: counting swaps some operations for others that round differently."""
    return counted(lambda: torch.stack([term.float() for term in decomposer.loss(batch, 0.0).values()]).sum().backward())


def _positions(batch: Batch) -> int | Tensor:
    if batch.x is None:
        return len(next(iter(batch.clean.values())))
    return batch.x.shape[0] if batch.length is None else batch.length.sum()


def _parts(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in `count` parts of equal size."""
    if count == 1:
        yield batch
        return
    whole = len(batch.x) if batch.x is not None else len(next(iter(batch.clean.values())))
    if whole % count:
        raise UserError(f"method.batch={whole} does not divide into method.accumulate={count} parts")
    for start in range(0, whole, whole // count):

        def cut(value: Tensor | None, start: int = start) -> Tensor | None:
            return None if value is None else value[start : start + whole // count]

        clean = {point: value[start : start + whole // count] for point, value in batch.clean.items()}
        yield replace(batch, x=cut(batch.x), length=cut(batch.length), doc=cut(batch.doc), clean=clean, logits=cut(batch.logits))
