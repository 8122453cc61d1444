"""Every experiment's smoke preset, one after another, in a folder of its own: nothing that was made before is found, and nothing is left.

One process plans and draws all of them, so that imports, the target and its text are paid for once.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from decomp_bench.errors import UserError
from decomp_bench.experiment import Experiment, Options, load, run
from decomp_bench.script import execute

PRESET = "smoke"


@dataclass(frozen=True)
class Smoked:
    """How one experiment went: seconds of wall clock, and in a line what failed, empty where nothing did."""

    name: str
    seconds: float
    error: str


def smoke(experiments: Sequence[Experiment], into: Path, tell: Callable[[Smoked], None], workers: int | None = None) -> list[Smoked]:
    """Copy these experiments into a folder and run the smoke preset of each there; what they print goes into FOLDER/log.txt.

    One that fails does not stop the others. Raises UserError where the folder has experiments already.
    """
    if (into / "experiments").exists():
        raise UserError(f"{into} has experiments already: name an empty folder")
    for one in experiments:
        shutil.copytree(one.path, into / "experiments" / one.name, ignore=shutil.ignore_patterns("__pycache__"))
    done = []
    for one in experiments:
        began = time.monotonic()
        with (into / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            print(f"\n{one.name}")
            error = _run(into / "experiments" / one.name, workers)
            print(error)
        done.append(Smoked(one.name, time.monotonic() - began, error))
        tell(done[-1])
    return done


def _run(path: Path, workers: int | None) -> str:
    """Run one experiment; what failed."""
    try:
        found = load(str(path))
        if found.config.script:
            return "" if any(execute(found, Options(preset=PRESET)).iterdir()) else "it wrote nothing"
        outcome = run(found, Options(preset=PRESET, workers=workers))
        return "; ".join(outcome.failures) or ("" if outcome.frame is not None else "no run applies to its target")
    except Exception as error:  # whatever it is, the others still run
        print(traceback.format_exc())
        return " ".join(f"{type(error).__name__}: {error}".split())
