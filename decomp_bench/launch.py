"""Training and evaluating runs in this process: claim their folders, train together what can be, evaluate, measure, record."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from filelock import Timeout

from decomp_bench.config import RunConfig, digest
from decomp_bench.errors import UserError
from decomp_bench.measure import Bench, measure
from decomp_bench.runs import Existing, ResolvedRun, Run, create, find_trained, resolve, runs_folder

if TYPE_CHECKING:
    from decomp_bench.decomposer import Decomposer

Progress = Callable[[dict[str, Any]], None]
Mode = Literal["all", "train", "evaluate"]


@dataclass
class Claim:
    """A run that this process holds the lock of, and what is left to do for it: train, resume, evaluate or skip."""

    resolved: ResolvedRun
    run: Run
    action: str
    decomposer: Decomposer | None = None
    note: str = ""


def execute(
    configs: Sequence[RunConfig],
    existing: Existing = "resume",
    experiment: str = "",
    progress: Progress | None = None,
    mode: Mode = "all",
    measurements: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Run]:
    """Train, evaluate and measure runs in this process; each run's status says how it went.

    `measurements` are names and settings (see `decomp_bench.measurements`); they need a run that is done. Mode `train` leaves the
    evaluation out; `evaluate` evaluates again what is trained already, and trains nothing.
    Raises UserError before anything is written where a config does not fit. One run's failure does not stop the others; an
    interruption saves the state of all and is raised again.
    """
    tell = progress or (lambda _event: None)
    groups = []
    for group in _alike(configs, lambda config: [config.target, config.data.model_dump(), config.train.model_dump()]):
        tell({"phase": "load"})
        groups.append(_load(group))
    runs = []
    with _terminable():
        for target, source, resolved in groups:
            with ExitStack() as stack:
                claims = [_claim(one, existing, mode, stack) for one in resolved]
                _work(claims, target, source, experiment, tell, mode)
                _publish(claims)
                if measurements and mode == "all":
                    measure([claim.run for claim in claims if not claim.note], Bench(target, source, experiment, tell), measurements)
                runs += [claim.run for claim in claims]
    return runs


def _load(configs: list[RunConfig]) -> tuple[Any, Any, list[ResolvedRun]]:
    import torch

    from decomp_bench import data, targets
    from decomp_bench.train import pick_device

    train = configs[0].train
    torch.set_num_threads(train.threads)
    target = targets.load(configs[0].target, str(pick_device(train.device)))
    source = data.source(target, configs[0].data)
    resolved = {one.id: one for one in (resolve(config, target, source) for config in configs)}
    return target, source, list(resolved.values())


def _claim(resolved: ResolvedRun, existing: Existing, mode: Mode, stack: ExitStack) -> Claim:
    """Lock a run and decide what to do with what is there."""
    run = Run(runs_folder() / resolved.id)
    lock = run.lock()
    try:
        lock.acquire(timeout=1)
    except Timeout:
        return Claim(resolved, run, "skip", note="another process works on it")
    stack.callback(lock.release)
    donor = None if run.path.exists() or existing == "overwrite" else find_trained(resolved.training_key)
    if resolved.config.imported and (existing == "overwrite" or not (run.trained or donor)):
        raise UserError(f"run {run.id} is an imported one and is never trained; import its files again: decomp-bench import")
    if mode == "evaluate" and not (run.trained or donor):
        raise UserError(f"nothing trained fits {run.id} (its method or data has changed since, or it is unfinished): train it again")
    if run.path.exists() and existing == "error":
        raise UserError(f"run {run.id} exists; use --existing resume, skip or overwrite")
    if run.path.exists() and existing == "overwrite":
        shutil.rmtree(run.path)
        return Claim(resolved, create(resolved), "train")
    if not run.path.exists():
        create(resolved)
        return Claim(resolved, run, _adopt(run, donor) if donor else "train")
    return Claim(resolved, run, "skip" if existing == "skip" else _missing(run, mode))


def _missing(run: Run, mode: Mode) -> str:
    done = run.evaluated and run.manifest.get("status") == "done"
    if run.trained:
        return "evaluate" if mode == "evaluate" or (mode == "all" and not done) else "skip"
    return "resume" if any((run.path / "state").glob("*")) and run.manifest.get("status") != "failed" else "train"


def _adopt(run: Run, donor: Run) -> str:
    """Take over the weights of a run that differs in its evaluation only."""
    for name in ("checkpoint_two_thirds", "metrics.jsonl", "checkpoint"):
        source, copy = donor.path / name, run.path / name
        if source.is_dir():
            partial = copy.with_name(f".{name}.{os.getpid()}")
            shutil.copytree(source, partial)
            os.replace(partial, copy)
        elif source.exists():
            shutil.copy(source, copy)
    made = donor.manifest
    run.update(trained_in={"run": donor.id, "git": made.get("git")}, steps=made.get("steps"), cost=made.get("cost", {}))
    if "imported" in made:
        run.update(imported=made["imported"])
    run.log(f"weights taken from {donor.id}, which was trained alike")
    return "evaluate"


def _work(claims: list[Claim], target: Any, source: Any, experiment: str, tell: Progress, mode: Mode) -> None:
    todo = [claim for claim in claims if claim.action != "skip"]
    try:
        for resume in (False, True):
            _train([c for c in todo if c.action == ("resume" if resume else "train")], target, source, tell, resume)
        if mode != "train":
            alive = [claim for claim in todo if claim.run.trained and claim.run.manifest["status"] != "failed"]
            for group in _alike(alive, lambda claim: claim.resolved.config.eval.model_dump()):
                _evaluate(group, target, source, experiment, tell)
        for claim in todo:
            if claim.run.manifest["status"] != "failed":
                claim.run.update(status="done", error=None)
                claim.run.log("done")
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        for claim in todo:
            if claim.run.path.exists() and not full and claim.run.manifest["status"] not in ("done", "failed"):
                claim.run.update(status="interrupted")
                claim.run.log(f"interrupted ({type(error).__name__})")
        raise


def _publish(claims: list[Claim]) -> None:
    """Log what was finished here with Weights & Biases, where that is asked for."""
    from decomp_bench.tracking import publish

    for claim in claims:
        config = claim.resolved.config
        if claim.action != "skip" and config.train.wandb != "off" and claim.run.manifest["status"] == "done":
            publish(claim.run.path, claim.run.id, config.model_dump(mode="json"), config.train.wandb)
            claim.run.log(f"logged with Weights & Biases ({config.train.wandb})")


def _train(claims: list[Claim], target: Any, source: Any, tell: Progress, resume: bool) -> None:
    """Train these runs together; where that raises, each alone, so that one run's error is its own."""
    from decomp_bench.provenance import peak_memory_mb
    from decomp_bench.tracking import Tracker
    from decomp_bench.train import Job, train

    if not claims:
        return
    for claim in claims:
        resolved = claim.resolved
        claim.decomposer = resolved.method(resolved.method_config, target, resolved.layers, resolved.config.seed).to(target.device)
        claim.run.update(status="training", error=None)
        claim.run.log(f"training{' resumed' if resume else ''}")
        if not resume:  # what an earlier attempt left behind is not this one's
            for name in ("state", "checkpoint", "checkpoint_two_thirds", "checkpoint_last_good"):
                shutil.rmtree(claim.run.path / name, ignore_errors=True)
    config = claims[0].resolved.config.train
    trackers = [Tracker(c.run.path, c.run.id, c.resolved.config.model_dump(mode="json"), config.wandb) for c in claims]
    jobs = [Job(claim.decomposer, claim.run.path, tracker) for claim, tracker in zip(claims, trackers, strict=True)]  # type: ignore[arg-type]
    try:
        tell({"phase": "prepare"})
        outcomes = train(jobs, source, config, lambda event: tell({"phase": "train", **event}), resume)
    except Exception as error:
        _separately(claims, error, lambda claim: _train([claim], target, source, tell, resume))
        return
    finally:
        for tracker in trackers:
            tracker.close()
    for claim, outcome in zip(claims, outcomes, strict=True):
        cost = {"train_wall_s": round(outcome.seconds, 2), "train_cpu_s": round(outcome.cpu_seconds, 2), "tokens": outcome.tokens}
        cost |= {"flops": outcome.flops, "peak_memory_mb": peak_memory_mb(), "trained_together": len(claims), "threads": config.threads}
        cost |= _gpu_cost(target, outcome.seconds)
        claim.run.update(steps=outcome.steps, cost=cost, device=str(target.device))
        if outcome.error:
            _fail(claim, outcome.error)
        elif not claim.run.trained:
            claim.decomposer.save(claim.run.checkpoint)  # type: ignore[union-attr]


def _gpu_cost(target: Any, seconds: float) -> dict[str, float]:
    import torch

    if getattr(target.device, "type", "cpu") != "cuda":
        return {}
    return {"gpu_s": round(seconds, 2), "gpu_peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1)}


def _evaluate(claims: list[Claim], target: Any, source: Any, experiment: str, tell: Progress) -> None:
    """Evaluate these runs over one clean pass; where that raises, each alone."""
    from decomp_bench.evaluate import evaluate

    for claim in claims:
        claim.run.update(status="evaluating")
    tell({"phase": "evaluate"})
    watch = time.monotonic()
    decomposers = [claim.run.load(target).to(target.device) for claim in claims]
    two_thirds = [claim.run.path / "checkpoint_two_thirds" for claim in claims]
    snapshots = [
        claim.run.load(target, folder.name).to(target.device) if (folder / "decomposer.json").exists() else None
        for claim, folder in zip(claims, two_thirds, strict=True)
    ]
    try:
        config = claims[0].resolved.config.eval
        found = evaluate(decomposers, source, config, snapshots, lambda event: tell({"phase": "evaluate", **event}))
    except Exception as error:
        _separately(claims, error, lambda claim: _evaluate([claim], target, source, experiment, tell))
        return
    seconds = (time.monotonic() - watch) / len(claims)
    for claim, evaluation in zip(claims, found, strict=True):
        store(claim.run, evaluation, experiment)
        claim.run.update(cost={**claim.run.manifest["cost"], "evaluate_wall_s": round(seconds, 2)}, converged=evaluation.converged)


def store(run: Run, evaluation: Any, experiment: str = "") -> None:
    """Write an evaluation's rows and documents into a run folder, and their hashes into its manifest."""
    from decomp_bench import results
    from decomp_bench.provenance import artifact_hashes
    from decomp_bench.runs import ARTIFACTS

    steps = run.manifest.get("steps") or 0
    own = {"run_id": run.id, "experiment": experiment, "seed": run.config.seed, "step": steps}
    rows = [{"converged": evaluation.converged, **row, **own} for row in evaluation.rows]
    results.write(results.frame(rows), run.path / "results.parquet")
    results.write(evaluation.documents.assign(run_id=run.id), run.path / "documents.parquet")
    run.update(artifacts=artifact_hashes(run.path, ARTIFACTS))


def _separately(claims: list[Claim], error: Exception, again: Callable[[Claim], None]) -> None:
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        raise error
    if len(claims) == 1:
        claims[0].run.log(traceback.format_exc())
        _fail(claims[0], f"{type(error).__name__}: {error}")
        return
    for claim in claims:
        claim.run.log(f"failed beside others ({type(error).__name__}), tried again alone")
        again(claim)


def _fail(claim: Claim, message: str) -> None:
    line = message.strip().splitlines()[0] if message.strip() else "unknown error"
    claim.run.update(status="failed", error=line)
    claim.run.log(f"failed: {message}")


def _alike(items: Iterable[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(digest(key(item), 16), []).append(item)
    return list(groups.values())


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does: with the state saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
