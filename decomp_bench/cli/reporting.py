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
        list[str] | None, typer.Argument(help="Runs and experiments; none: every experiment.", metavar="[{run|experiment}...]")
    ] = None,
    directory: Dir = None,
) -> None:
    """Write a page of an experiment, of a run with its components, or of the whole suite: one HTML file each."""
    from decomp_bench.report.experiments import experiment_page, suite_page

    if not what:
        from decomp_bench.experiment import all_experiments, experiments_folder

        index, pages = suite_page(all_experiments(directory), experiments_folder(directory).parent)
        for path in (*pages, index):
            print(path)
        return
    for name in what:
        found = _experiment(name, directory)
        if found is not None:
            print(experiment_page(found))


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
