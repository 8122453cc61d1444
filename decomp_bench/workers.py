"""Groups of runs in worker processes that this one starts, watches and, if it has to, stops.

A worker is `python -m decomp_bench.workers JOB.json`. It writes its latest progress into status.json beside the job, what came of
its runs into result.json, and everything it prints into log.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decomp_bench.config import RunConfig
from decomp_bench.errors import UserError
from decomp_bench.runs import FOLDER_VARIABLE, Existing, Run, runs_folder

EVALUATION_SHARE = 0.25
"""Part of a group's work that comes after training, for the estimate of the time left."""
SMALL = 600.0
"""Estimated seconds of a whole below which a group for each worker is enough."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that tell a process how many threads to compute with."""
PATIENCE = 90.0
"""Seconds that stopped workers get to save their state."""


@dataclass
class Group:
    """Runs that one worker executes together, and what is known of how that goes."""

    configs: list[RunConfig]
    label: str
    cost: float = 1.0
    """Estimated seconds; only the ratio to other groups matters."""
    measuring: float = 0.0
    """Part of the cost that measurements after training and evaluation take."""
    process: subprocess.Popen | None = None
    folder: Path | None = None
    event: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    error: str = ""
    finished: bool = False

    @property
    def fraction(self) -> float:
        """How much of the group's work is done, roughly."""
        phase, whole = self.event.get("phase"), self.event.get("steps") or self.event.get("batches") or 1
        done = min(1.0, (self.event.get("step") or self.event.get("batch") or 0) / whole)
        if self.finished:
            return 1.0
        if phase == "measure":
            return 1 - self.measuring * (1 - done)
        if phase == "evaluate":
            done = 1 - EVALUATION_SHARE + EVALUATION_SHARE * done
        else:
            done = (1 - EVALUATION_SHARE) * done if phase == "train" else 0.0
        return (1 - self.measuring) * done


@dataclass(frozen=True)
class Overview:
    """Every group, and the time so far and to come."""

    groups: list[Group]
    seconds: float
    left: float | None


Cost = Callable[[RunConfig], float]


def chunked(configs: Sequence[RunConfig], cost: Cost, apart: Callable[[RunConfig], Any], workers: int) -> list[Group]:
    """Groups of about equal cost, at least one for each worker, never mixing configs that `apart` tells apart; the longest first."""
    total = sum(map(cost, configs))
    shares = workers if total < SMALL else 2 * workers  # every group pays for a start of its own; more groups balance better
    limit = max([total / max(1, shares) * (1.3 if total < SMALL else 1.0), *map(cost, configs)])
    groups: list[tuple[Any, Group]] = []
    for config in sorted(configs, key=cost, reverse=True):
        key, own = apart(config), cost(config)
        fitting = [group for other, group in groups if other == key and group.cost + own <= limit * 1.001]
        if fitting:
            fitting[-1].configs.append(config)
            fitting[-1].cost += own
        else:
            groups.append((key, Group([config], "", own)))
    made = sorted((group for _, group in groups), key=lambda group: -group.cost)
    for group in made:
        methods = list(dict.fromkeys(config.method for config in group.configs))
        group.label = f"{', '.join(methods)} ({len(group.configs)})"
    return made


def launch(
    groups: list[Group],
    workers: int,
    existing: Existing = "resume",
    experiment: str = "",
    report: Callable[[Overview], None] | None = None,
    measurements: Mapping[str, Mapping[str, Any]] | None = None,
    every: float = 0.5,
) -> list[Group]:
    """Execute groups in worker processes, so many at a time; none: in this process.

    Ctrl-C stops them, waits until they saved their state, and is raised again.
    """
    if not workers:
        return _here(groups, existing, experiment, measurements or {})
    folder = (runs_folder() / ".jobs" / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}").resolve()
    began, waiting = time.monotonic(), list(groups)
    try:
        while not all(group.finished for group in groups):
            running = [group for group in groups if group.process is not None and not group.finished]
            while waiting and len(running) < workers:
                group = waiting.pop(0)
                job = {"existing": existing, "experiment": experiment, "measurements": measurements or {}}
                _start(group, folder / f"{len(groups) - len(waiting):02d}", job)
                running.append(group)
            for group in running:
                _look(group)
            if report is not None:
                seconds = time.monotonic() - began
                report(Overview(groups, seconds, _left(groups, seconds)))
            if not all(group.finished for group in groups):
                time.sleep(every)
    except BaseException:
        _stop(groups)
        raise
    if not any(group.error for group in groups):
        shutil.rmtree(folder, ignore_errors=True)
    return groups


def _here(groups: list[Group], existing: Existing, experiment: str, measurements: Mapping[str, Mapping[str, Any]]) -> list[Group]:
    from decomp_bench.launch import execute

    for group in groups:
        try:
            group.runs = execute(group.configs, existing, experiment, measurements=measurements)
        except UserError as error:
            group.error = str(error)
        group.finished = True
    return groups


def _start(group: Group, folder: Path, job: dict[str, Any]) -> None:
    group.folder = folder
    group.folder.mkdir(parents=True)
    job |= {"configs": [config.model_dump(mode="json") for config in group.configs], "parent": os.getpid()}
    (group.folder / "job.json").write_text(json.dumps(job))
    threads = str(group.configs[0].train.threads)
    environment = {**os.environ, FOLDER_VARIABLE: str(runs_folder().resolve()), "PYTHONUNBUFFERED": "1"}
    environment |= dict.fromkeys(THREADS, threads)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    with (group.folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "decomp_bench.workers", str(group.folder / "job.json")]
        # A session of its own: Ctrl-C reaches this process only, which then stops the workers one way for every signal.
        group.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)


def _look(group: Group) -> None:
    """Read what a worker wrote, and whether it has ended."""
    assert group.process is not None
    assert group.folder is not None
    code = group.process.poll()
    group.event = _read(group.folder / "status.json") or group.event
    if code is None:
        return
    result = _read(group.folder / "result.json")
    group.finished = True
    if result is None:
        group.error = f"the worker ended with code {code}; see {group.folder / 'log.txt'}"
        return
    group.runs = [Run(runs_folder() / run) for run in result["runs"]]
    group.error = result["error"]


def _left(groups: list[Group], seconds: float) -> float | None:
    total = sum(group.cost for group in groups) or 1.0
    done = sum(group.cost * group.fraction for group in groups) / total
    return seconds * (1 - done) / done if done > 0.02 else None


def _stop(groups: list[Group]) -> None:
    running = [group.process for group in groups if group.process is not None and group.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    until = time.monotonic() + PATIENCE
    for process in running:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def _write(data: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(data, default=float))
    os.replace(temporary, path)


# ---- in the worker


def work(job_file: Path) -> int:
    """Execute a job; the exit code is 0 wherever result.json says what happened, even where runs failed."""
    from decomp_bench.launch import execute

    job = json.loads(job_file.read_text())
    written = 0.0

    def tell(event: dict[str, Any]) -> None:
        nonlocal written
        if os.getppid() != job["parent"]:  # nobody is left to stop this worker, so it stops itself, with its state saved
            raise KeyboardInterrupt
        if time.monotonic() - written > 0.4 or event.get("step") == event.get("steps", -1):
            _write(event, job_file.with_name("status.json"))
            written = time.monotonic()

    result: dict[str, Any] = {"runs": [], "error": ""}
    try:
        configs = [RunConfig.model_validate(config) for config in job["configs"]]
        result["runs"] = [run.id for run in execute(configs, job["existing"], job["experiment"], tell, measurements=job["measurements"])]
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        result["error"] = str(error)
    _write(result, job_file.with_name("result.json"))
    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
