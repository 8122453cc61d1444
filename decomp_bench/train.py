"""The one training loop, over a list of decomposers that share a target and data.

A run alone, in a group or resumed has the same weights; one that diverges does not stop the others. Runs that are trained in one batched
step (`decomp_bench.stacking`) differ from a run alone by rounding.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from decomp_bench.config import TrainConfig
from decomp_bench.data.sources import Source
from decomp_bench.errors import UserError
from decomp_bench.stacking import lanes
from decomp_bench.training import LAST_GOOD, Job, Outcome, Streams, Training, learning_rate

__all__ = ["LAST_GOOD", "Job", "Outcome", "Training", "learning_rate", "pick_device", "train"]


def pick_device(name: str) -> torch.device:
    """`auto` as cuda, then mps, then cpu; raises UserError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device '{name}' here: use --device auto or cpu") from None
    return torch.device(name)


def train(
    jobs: list[Job], source: Source, config: TrainConfig, progress: Callable[[dict[str, Any]], None] | None = None, resume: bool = False
) -> list[Outcome]:
    """Train every job to its end and save its checkpoint.

    With `resume`, jobs continue from their saved states. An interrupt (Ctrl-C, SIGTERM) ends the current step, saves every state and
    raises KeyboardInterrupt; the resumed run reaches the same final weights.
    """
    torch.set_num_threads(config.threads)
    device = source.target.device
    streams = Streams(source, [job.decomposer for job in jobs])
    runs = [Training(job, streams, config, device) for job in jobs]
    for run in runs:
        run.start(resume)
    with _stop_requested() as stop:
        _loop(runs, config, progress, stop)
    return [run.outcome for run in runs]


def _loop(runs: list[Training], config: TrainConfig, progress: Callable | None, stop: threading.Event) -> None:
    active = lanes([run for run in runs if run.unfinished])
    began, first = time.perf_counter(), sum(run.step for lane in active for run in lane.runs)
    while active:
        running = [run for lane in active for run in lane.runs if run.unfinished]
        if stop.is_set():
            for run in running:
                run.save_state()
            raise KeyboardInterrupt
        step = min(lane.step for lane in active)
        for lane in active:
            if lane.step == step:
                lane.advance()
        if progress and (step % config.log_every == 0 or step + 1 == running[0].config.steps):
            progress(_progress(running, time.perf_counter() - began, first))
        active = [lane for lane in active if lane.unfinished]


def _progress(active: list[Training], seconds: float, first: int) -> dict[str, Any]:
    done = sum(run.step for run in active)
    left = sum(run.config.steps - run.step for run in active)
    rate = (done - first) / max(seconds, 1e-9)
    head = active[0]
    return {
        "step": head.step,
        "steps": head.config.steps,
        "running": len(active),
        "loss": head.last.get("loss"),
        "l0": head.last.get("l0"),
        "tokens_per_s": head.last.get("tokens_per_s"),
        "eta_s": left / rate if rate > 0 else None,
    }


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in two; a second signal interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
