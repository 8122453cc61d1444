"""Give trained runs the measurements that an experiment asks for: rows in each run's folder, made once."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decomp_bench.measurements import Asked, asked
from decomp_bench.runs import Run

if TYPE_CHECKING:
    from decomp_bench.data.sources import Source
    from decomp_bench.decomposer import Decomposer
    from decomp_bench.targets import TargetModel

Tell = Callable[[dict[str, Any]], None]


def missing(run: Run, wanted: Sequence[Asked]) -> list[Asked]:
    """The measurements that a run has no rows of."""
    return [one for one in wanted if not one.file(run.path).is_file()]


def errors(run: Run) -> list[str]:
    """Why measurements of a run failed, those that did at the last attempt."""
    found = run.manifest.get("measurements", {}) if run.path.is_dir() else {}
    return [f"{run.id}, {name}: {about['error']}" for name, about in found.items() if about.get("error")]


@dataclass(frozen=True)
class Bench:
    """What runs are measured on, and who hears of it."""

    target: TargetModel
    source: Source
    experiment: str
    tell: Tell


def measure(runs: Sequence[Run], bench: Bench, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Make the rows that are missing. What fails is recorded in the run's manifest and stops nothing else."""
    whole = asked(wanted, "the job")
    todo = [(run, one) for run in runs if run.trained and run.manifest["status"] == "done" for one in missing(run, whole)]
    for number, (run, one) in enumerate(todo):

        def told(done: int, parts: int, number: int = number, one: Asked = one) -> None:
            done_of_all = number * 1000 + 1000 * done // max(1, parts)
            bench.tell({"phase": "measure", "what": one.name, "step": done_of_all, "steps": 1000 * len(todo)})

        _one(run, one, bench, told)


def _one(run: Run, one: Asked, bench: Bench, told: Callable[[int, int], None]) -> None:
    from decomp_bench import results

    told(0, 1)
    began = time.monotonic()
    about: dict[str, Any] = {"key": one.key, "settings": one.settings.model_dump(mode="json"), "error": None}
    try:
        decomposer = run.load(bench.target).to(bench.target.device).eval()
        rows = one.measurement.measure(decomposer, bench.source, one.settings, told)
        common = _common(run, decomposer, bench)
        rows = [{**common, "metric_version": one.measurement.version, **_applicable(row), **row} for row in rows]
        results.write(results.frame(_of_target(row) for row in rows), one.file(run.path))
        run.log(f"measured: {one.name}")
    except Exception as error:
        text = str(error).strip().splitlines()
        about["error"] = f"{type(error).__name__}: {text[0] if text else 'unknown error'}"
        run.log(f"{one.name} failed\n{traceback.format_exc()}")
    about["wall_s"] = round(time.monotonic() - began, 2)
    run.update(measurements={**run.manifest.get("measurements", {}), one.name: about})


def _common(run: Run, decomposer: Decomposer, bench: Bench) -> dict[str, Any]:
    """The columns that all rows of a run share unless they say otherwise. The hash stands for the tokens of every split."""
    from decomp_bench.conditions import Condition, columns
    from decomp_bench.rows import describe

    config = run.config
    about = describe(decomposer, bench.source, config.eval, bench.source.hash) | columns(decomposer, Condition("cascading", "self"))
    own = {"run_id": run.id, "experiment": bench.experiment, "seed": config.seed, "step": run.manifest.get("steps") or 0}
    return {
        **about,
        "layer": "all",
        "site": "all",
        "base": "",
        "condition": "",
        "reason": "",
        "converged": run.manifest.get("converged"),
        **own,
    }


def _applicable(row: Mapping[str, Any]) -> dict[str, str]:
    return {"applicable": "yes" if math.isfinite(row["value"]) else "no"}


OF_A_RUN = ("seed", "step", "trainable", "converged", "init", "variant", "experiment")


def _of_target(row: dict[str, Any]) -> dict[str, Any]:
    """A row about the target alone without what is the run's, so that it is the same whichever run it came with."""
    return row if row["run_id"] else {key: value for key, value in row.items() if key not in OF_A_RUN}
