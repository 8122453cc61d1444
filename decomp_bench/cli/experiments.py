"""experiment list|show|run|smoke|status|new, and plot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decomp_bench.cli.training import Json, Sets, check_existing
from decomp_bench.errors import RunFailed, UserError

if TYPE_CHECKING:
    from decomp_bench.experiment import Experiment, Options, Outcome

Name = Annotated[str, typer.Argument(help="Number, name or folder.")]
Dir = Annotated[Path | None, typer.Option("--dir", help="Folder with experiments/, or the experiments themselves; default: here.")]
Preset = Annotated[str | None, typer.Option(help="One of those that `experiment list` shows; default: the experiment's own.")]
Only = Annotated[list[str] | None, typer.Option(help="Runs of this method, or of this condition (015: ours), only. Repeatable.")]
Seeds = Annotated[str | None, typer.Option(help="Such as 0,1,2; default: the experiment's own.")]
Target = Annotated[str | None, typer.Option(help="Another target than the experiment's own.")]

CONFIG = """title: {title}
question: What is the question?
target: pydocs-4l
seeds: [0]
preset: smoke
runs:
  - method: transcoder
    sweep: {{k: [8, 16]}}
presets:
  smoke:
    eval: {{tokens: 5000, bootstrap: 200}}
"""
README = """# {title}

**Question.** What is the question?

**Prediction.** What do you expect, and what would change your mind?

**Setup.** See `config.yaml`. Run it with `decomp-bench experiment run {number}`.

**Cost.** Not measured yet.

**Result.** None yet.

**Verdict.** None yet.
"""
RUN = '''"""The same as `decomp-bench experiment run` with this folder; takes the same options."""

import sys
from pathlib import Path

from decomp_bench import run_experiment

if __name__ == "__main__":
    run_experiment(Path(__file__).resolve().parent, sys.argv[1:])
'''


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(help="Experiments: list, show, run, smoke, status, new.", no_args_is_help=True, rich_markup_mode=None)
    for command, name in ((list_, "list"), (show_, "show"), (run, "run"), (smoke, "smoke"), (status, "status"), (new, "new")):
        group.command(name)(command)
    app.add_typer(group, name="experiment")
    app.command("plot")(plot)


def experiment_rows(directory: Path | None) -> list[dict[str, Any]]:
    """One entry for each experiment."""
    from decomp_bench.experiment import all_experiments

    return [
        {
            "experiment": one.name,
            "title": one.config.title,
            "target": one.config.target,
            "presets": sorted(one.config.presets),
            "results": _with_results(one),
        }
        for one in all_experiments(directory)
    ]


def _with_results(one: Experiment) -> list[str]:
    """Names of an experiment's results folders: of a program of its own, every folder that holds a file."""
    folders = [path for path in (one.root / "results" / one.name).glob("*") if path.is_dir()]
    there = "*.*" if one.config.script else "results.parquet"
    return sorted(path.name for path in folders if next(path.glob(there), None) is not None)


def list_(directory: Dir = None, as_json: Json = False) -> None:
    """Every experiment and the targets that it has results on."""
    from decomp_bench.cli.display import show

    show(experiment_rows(directory), as_json, "no experiments; make one: decomp-bench experiment new NAME")


def show_(name: Name, directory: Dir = None, as_json: Json = False) -> None:
    """An experiment's question, config and results."""
    import json

    from decomp_bench.cli.display import summary
    from decomp_bench.experiment import load
    from decomp_bench.results import read

    found = load(name, directory)
    if as_json:
        print(json.dumps({"name": found.name, "path": str(found.path), **found.config.model_dump(mode="json")}, indent=2))
        return
    readme = found.path / "README.md"
    print(readme.read_text() if readme.is_file() else f"{found.config.title}\n{found.config.question}")
    for file in sorted((found.root / "results" / found.name).glob("*/results.parquet")):
        print(f"\n{file.parent}")
        try:
            summary(read(file))
        except ValueError as error:
            print(error)


def _options(
    preset: str | None,
    only: list[str] | None,
    seeds: str | None,
    target: str | None,
    set_: list[str] | None,
    existing: str = "resume",
    workers: int | None = None,
) -> Options:
    from decomp_bench.experiment import Options

    try:
        numbers = tuple(int(part) for part in seeds.split(",")) if seeds else ()
    except ValueError:
        raise UserError(f"--seeds takes numbers such as 0,1,2; got '{seeds}'") from None
    if workers is not None and workers < 1:
        raise UserError(f"--workers takes at least 1; got {workers}")
    names = tuple(name for part in only or [] for name in part.split(","))
    return Options(preset, names, numbers, target, tuple(set_ or ()), workers, check_existing(existing))


def run(
    name: Name,
    preset: Preset = None,
    only: Only = None,
    seeds: Seeds = None,
    target: Target = None,
    set_: Sets = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one for each core.")] = None,
    existing: Annotated[str, typer.Option(help="What to do about runs that exist: resume, skip, overwrite or error.")] = "resume",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and run nothing.")] = False,
    directory: Dir = None,
) -> None:
    """Execute the runs that are missing, then gather results and draw figures. The same command again continues."""
    from decomp_bench import experiment
    from decomp_bench.cli.display import Board

    found = experiment.load(name, directory)
    options = _options(preset, only, seeds, target, set_, existing, workers)
    if dry_run:
        _show_plan(found, options, False)
        return
    if found.config.script:
        from decomp_bench.script import execute

        print(f"results: {execute(found, options)}")
        return
    with Board() as board:
        outcome = experiment.run(found, options, board)
    _conclude(outcome)


def _show_plan(found: Any, options: Options, as_json: bool) -> None:
    from decomp_bench import experiment
    from decomp_bench.cli.display import duration, show
    from decomp_bench.runs import folder_at
    from decomp_bench.script import results_folder, settings

    if found.config.script:
        rows = [{"setting": key, "value": value} for key, value in settings(found, options).items()]
        show(rows, as_json, "no settings")
        if not as_json:
            print(f"{found.path / found.config.script}\nresults: {results_folder(found, options)}")
        return
    with folder_at(found.root / "results" / "runs"):
        plan = experiment.plan(found, options)
        rows = experiment.status(plan)
    show(rows, as_json, "no runs")
    if as_json:
        return
    missing = [row for row in rows if row["status"] != "done"]
    for reason in plan.left_out:
        print(f"left out: {reason}")
    total = sum(row["seconds"] for row in missing)
    print(f"{len(rows) - len(missing)} of {len(rows)} runs done; the others take about {duration(total)} of one core")
    print(f"results: {plan.folder}")


def _conclude(outcome: Outcome) -> None:
    """The table, what was left out, what failed, the figures and the next command."""
    from decomp_bench.cli.display import summary

    plan = outcome.plan
    if outcome.frame is not None:
        summary(outcome.frame)
        _show_measured(plan.folder)
    for reason in plan.left_out:
        print(f"left out: {reason}")
    print(
        f"runs: {len(plan.wanted)} wanted, {len(plan.wanted) - outcome.executed} there already, {outcome.executed} executed, "
        f"{len(outcome.failures)} failed"
    )
    if outcome.frame is not None:
        print(f"results: {plan.folder / 'results.parquet'}")
    pictures = sorted((path for path in outcome.figures if path.suffix == ".png"), key=lambda path: path.stem.endswith("_cascading"))
    for path in pictures[:6]:
        print(f"figure: {path}")
    if len(pictures) > 6:
        print(f"and {len(pictures) - 6} more figures, each as PNG, SVG and PDF, in {pictures[0].parent}")
    if outcome.failures:
        raise RunFailed(f"{len(outcome.failures)} failed: {'; '.join(outcome.failures)}")
    seeds = max((one.config.seed for one in plan.wanted), default=0)
    number = plan.experiment.name[:3]
    preset = f" --preset {plan.preset}" if plan.preset and plan.preset != plan.experiment.config.preset else ""
    print(f"next: decomp-bench experiment run {number}{preset} --seeds {seeds + 1}   (another seed, then the intervals cover seeds)")


def _show_measured(folder: Path) -> None:
    """What the measurements of a results folder came to."""
    from decomp_bench import analysis
    from decomp_bench.cli.display import show
    from decomp_bench.gather import measured_in

    for name, frame in measured_in(folder).items():
        try:
            rows = [dict(row) for row in analysis.measured_table(name, frame)]
        except ValueError as error:
            print(f"{name}: {error}")
            continue
        if rows:
            print(f"\n{name}, {analysis.measured_note(name)}")
            show(rows, False)


def smoke(
    names: Annotated[list[str] | None, typer.Argument(help="Numbers, names or folders; none: every experiment.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one for each core.", min=1)] = None,
    keep: Annotated[Path | None, typer.Option(help="An empty folder that keeps the results; default: they are deleted.")] = None,
    directory: Dir = None,
) -> None:
    """Run the smoke preset of every experiment apart from all other results; exit 1 where one fails."""
    import shutil
    import tempfile
    import time

    from decomp_bench import experiment
    from decomp_bench.cli.display import duration
    from decomp_bench.smoke import Smoked
    from decomp_bench.smoke import smoke as run_all

    chosen = [experiment.load(name, directory) for name in names] if names else experiment.all_experiments(directory)
    width = max((len(one.name) for one in chosen), default=0)
    folder, began = keep or Path(tempfile.mkdtemp(prefix="decomp-bench-smoke-")), time.monotonic()

    def line(one: Smoked) -> None:
        print(f"{one.name:{width}}  {duration(one.seconds):>5}  {one.error or 'passed'}", flush=True)

    try:
        done = run_all(chosen, folder, line, workers)
    except BaseException:  # it would begin again in another folder
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    failed = [one.name for one in done if one.error]
    print(f"{len(done) - len(failed)} of {len(done)} experiments passed in {duration(time.monotonic() - began)}")
    if failed:
        raise RunFailed(f"{', '.join(failed)}; what was printed and made is in {folder}")
    if keep is None:
        shutil.rmtree(folder, ignore_errors=True)


def status(
    name: Name,
    preset: Preset = None,
    only: Only = None,
    seeds: Seeds = None,
    target: Target = None,
    set_: Sets = None,
    directory: Dir = None,
    as_json: Json = False,
) -> None:
    """Which runs of an experiment are done, which are missing, and what those would take."""
    from decomp_bench import experiment

    _show_plan(experiment.load(name, directory), _options(preset, only, seeds, target, set_), as_json)


def new(
    name: Annotated[str, typer.Argument(help="Such as wider_dictionaries; the number is given.")],
    directory: Dir = None,
) -> None:
    """Make a new experiment's folder with README, config and run.py."""
    from decomp_bench.experiment import experiments_folder

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"'{name}' is no name for an experiment: use lower-case letters, digits and underscores")
    folder = experiments_folder(directory)
    numbers = [int(path.name[:3]) for path in folder.iterdir() if re.match(r"\d{3}_", path.name)]
    number = f"{max(numbers, default=0) + 1:03d}"
    path = folder / f"{number}_{name}"
    path.mkdir()
    title = name.replace("_", " ").capitalize()
    (path / "config.yaml").write_text(CONFIG.format(title=title))
    (path / "README.md").write_text(README.format(title=title, number=number))
    (path / "run.py").write_text(RUN)
    print(f"{path}\nnext: edit {path / 'config.yaml'}, then decomp-bench experiment run {number}")


def plot(
    name: Name,
    target: Target = None,
    preset: Preset = None,
    directory: Dir = None,
) -> None:
    """Draw an experiment's figures again from its stored results."""
    from decomp_bench.experiment import load
    from decomp_bench.gather import draw

    found = load(name, directory)
    if target is not None or preset is not None:
        folders = [found.results_folder(target or found.config.target, preset)]
    else:
        folders = [file.parent for file in sorted((found.root / "results" / found.name).glob("*/results.parquet"))]
    if not folders or not (folders[0] / "results.parquet").is_file():
        where = f" in {folders[0]}" if folders else ""
        raise UserError(f"{found.name} has no results{where}: decomp-bench experiment run {found.name[:3]}")
    for folder in folders:
        for path in draw(folder):
            print(path)
