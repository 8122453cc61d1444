"""report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decomp_bench.cli.experiments import Dir
from decomp_bench.errors import UserError

if TYPE_CHECKING:
    from decomp_bench.experiment import Experiment


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("report")(report)


def report(
    what: Annotated[
        list[str] | None, typer.Argument(help="Runs and experiments; none: every experiment.", metavar="{run|experiment}")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of a run: held-out tokens that its components are looked at on.", min=1)] = 20_000,
    shown: Annotated[int, typer.Option("--components", help="Of a run: components shown, of all sites together; 0: none.", min=0)] = 256,
    directory: Dir = None,
) -> None:
    """Write a page of an experiment, of a run with its components, or of the whole suite: one HTML file each.

    Without a name the tables of results/README.md are made again too.
    """
    from decomp_bench.report.experiments import experiment_page, suite_page

    if not what:
        from decomp_bench.experiment import all_experiments, experiments_folder
        from decomp_bench.report.summary import update

        known, root = all_experiments(directory), experiments_folder(directory).parent
        index, pages = suite_page(known, root)
        for path in (*pages, index, update(root, known)):
            if path is not None:
                print(path)
        return
    for name in what:
        found = _experiment(name, directory)
        print(experiment_page(found) if found is not None else _run(name, tokens, shown))


def _run(name: str, tokens: int, shown: int) -> Path:
    from decomp_bench.cli.display import Line
    from decomp_bench.report.components import Settings
    from decomp_bench.report.run import run_page
    from decomp_bench.runs import find

    try:
        found = find(name)
    except UserError as error:
        raise UserError(str(error).replace("no run ", "no run or experiment ", 1)) from None
    with Line() as line:
        return run_page(found, Settings(tokens, shown) if shown else None, line)


def _experiment(name: str, directory: Path | None) -> Experiment | None:
    """The experiment of this name, None where it can only be a run's."""
    from decomp_bench.experiment import all_experiments, load

    if (Path(name) / "config.yaml").is_file() and not (Path(name) / "manifest.json").is_file():
        return load(name)
    try:
        known = all_experiments(directory)
    except UserError:
        if directory is not None or (len(name) == 3 and name.isdigit()):
            raise
        return None
    return next((one for one in known if name in (one.name, one.name[:3], one.name[4:])), None)
