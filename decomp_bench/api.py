"""The same from Python: train, evaluate, load, read results, run an experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.errors import RunFailed, UserError

if TYPE_CHECKING:
    import pandas as pd

    from decomp_bench.runs import Existing, Run
    from decomp_bench.targets import TargetModel

Progress = Callable[[dict[str, Any]], None]


def train_run(method: str, *, existing: Existing = "resume", progress: Progress | None = None, **options: Any) -> Run:
    """Train a run, or find it where it is trained already: `train_run("transcoder", target="pydocs-4l", k=16, steps=200)`.

    Options are those of a run (`target`, `layers`, `seed`, `data`, `eval`, `train`) and, by their own names, the method's.
    """
    from decomp_bench.config import RunConfig, parse
    from decomp_bench.launch import execute

    own = {key: value for key, value in options.items() if key not in RunConfig.model_fields}
    rest = {key: value for key, value in options.items() if key in RunConfig.model_fields}
    config = parse(RunConfig, {**rest, "method": method, "method_config": {**rest.get("method_config", {}), **own}}, "train_run()")
    return _done(execute([config], existing, "", progress, "train")[0])


def evaluate_run(run: Run | str, *, again: bool = False, progress: Progress | None = None, **options: Any) -> pd.DataFrame:
    """A run's results, measured where they are not there yet.

    Options are those of `EvalConfig` (`tokens=20_000`); results under other options are another run with the same weights.
    """
    from decomp_bench.config import EvalConfig, merge, parse
    from decomp_bench.launch import execute

    run = load_run(run) if isinstance(run, str) else run
    if run.evaluated and not again and not options:
        return run.results()
    if not run.trained:
        raise UserError(f"run {run.id} is not trained ({run.status}); continue it: {run.resume_command}")
    config = run.config
    changed = parse(EvalConfig, merge(config.eval.model_dump(), options), "evaluate_run()")
    mode = "evaluate" if again or not run.evaluated else "all"
    return _done(execute([config.model_copy(update={"eval": changed})], "resume", "", progress, mode)[0]).results()


def align_runs(
    first: Run | str, second: Run | str, *, tokens: int = 20_000, seed: int = 0, progress: Progress | None = None
) -> pd.DataFrame:  # fmt: skip
    """Whether two trained runs on one target found the same components and compute the same: `decomp_bench.alignment.align`, on the
    first's held-out data."""
    from decomp_bench import data, targets
    from decomp_bench.alignment import align

    runs = [load_run(one) if isinstance(one, str) else one for one in (first, second)]
    config = runs[0].config
    target = targets.load(config.target)
    sides = [one.load(target if one.config.target == config.target else None) for one in runs]
    return align(sides[0], sides[1], data.source(target, config.data), tokens, config.eval.split, seed, progress)


def load_run(prefix: str) -> Run:
    """The run whose id starts with this, or whose folder it is."""
    from decomp_bench.runs import find

    return find(prefix)


def load_target(uri: str = "pydocs-4l", device: str = "cpu") -> TargetModel:
    """A frozen model by URI."""
    from decomp_bench.targets import load

    return load(uri, device)


def load_results(experiment: str, target: str | None = None, *, preset: str | None = None, directory: Path | None = None) -> pd.DataFrame:
    """An experiment's results on a target, as a tidy frame: `load_results("011")`."""
    from decomp_bench.experiment import load
    from decomp_bench.results import read

    found = load(experiment, directory)
    try:
        return read(found.results_folder(target or found.config.target, preset) / "results.parquet")
    except ValueError as error:
        raise UserError(f"{error}: decomp-bench experiment run {found.name[:3]}") from None


def run_experiment(name: str | Path, arguments: list[str] | None = None, **options: Any) -> pd.DataFrame | None:
    """Execute the missing runs of an experiment and return its results; options are those of `decomp_bench.experiment.Options`.

    With `arguments`, the options of the command line, it does what `decomp-bench experiment run` does, and exits.
    """
    if arguments is not None:
        from decomp_bench.cli import main

        main(["experiment", "run", str(name), *arguments])
    from decomp_bench.experiment import Options, load, run

    outcome = run(load(str(name)), Options(**options))
    if outcome.failures:
        raise RunFailed("; ".join(outcome.failures))
    return outcome.frame


def _done(run: Run) -> Run:
    if run.status == "failed":
        raise RunFailed(f"run {run.id} failed: {run.manifest.get('error')}; see {run.path / 'log.txt'}")
    return run
