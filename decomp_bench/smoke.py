"""Every experiment's smoke preset in a folder of its own: nothing that was made before is found, and nothing is left.

A process for each core takes one experiment after another and executes its runs itself, so that imports are paid for once.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from decomp_bench.config import TrainConfig
from decomp_bench.costs import default_workers
from decomp_bench.errors import RunFailed, UserError
from decomp_bench.experiment import Experiment, Options, load, run
from decomp_bench.script import execute
from decomp_bench.workers import THREADS

PRESET = "smoke"


@dataclass(frozen=True)
class Smoked:
    """How one experiment went: seconds of wall clock, and in a line what failed, empty where nothing did."""

    name: str
    seconds: float
    error: str


def smoke(experiments: Sequence[Experiment], into: Path, tell: Callable[[Smoked], None], workers: int | None = None) -> list[Smoked]:
    """Copy these experiments into a folder and run the smoke preset of each there; what they print goes into FOLDER/log.txt.

    One that fails does not stop the others. Raises UserError where the folder has experiments already, RunFailed where a process is killed.
    """
    if (into / "experiments").exists():
        raise UserError(f"{into} has experiments already: name an empty folder")
    for one in experiments:
        shutil.copytree(one.path, into / "experiments" / one.name, ignore=shutil.ignore_patterns("__pycache__"))
    done = []
    with _threads(TrainConfig().threads):
        pool = ProcessPoolExecutor(workers or default_workers(TrainConfig()), multiprocessing.get_context("spawn"))
        try:
            for one, printed in pool.map(_smoked, [into / "experiments" / one.name for one in experiments]):
                with (into / "log.txt").open("a") as log:
                    log.write(printed)
                done.append(one)
                tell(one)
        except BrokenProcessPool:
            raise RunFailed(f"a process was killed after {len(done)} experiments, perhaps for want of memory: try --workers 1") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return done


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes that are started meanwhile keep to so many threads."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _smoked(path: Path) -> tuple[Smoked, str]:
    """How an experiment went, and all that it printed."""
    began, printed = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        print(f"\n{path.name}")
        error = _run(path)
        print(error)
    return Smoked(path.name, time.monotonic() - began, error), printed.getvalue()


def _run(path: Path) -> str:
    """Run one experiment; what failed."""
    try:
        found = load(str(path))
        if found.config.script:
            return "" if any(execute(found, Options(preset=PRESET)).iterdir()) else "it wrote nothing"
        outcome = run(found, Options(preset=PRESET, workers=0))
        return "; ".join(outcome.failures) or ("" if outcome.frame is not None else "no run applies to its target")
    except Exception as error:  # whatever it is, the others still run
        print(traceback.format_exc())
        return " ".join(f"{type(error).__name__}: {error}".split())
