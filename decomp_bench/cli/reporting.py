"""report, cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decomp_bench.cli.experiments import Dir
from decomp_bench.cli.training import Json
from decomp_bench.errors import UserError

if TYPE_CHECKING:
    from decomp_bench.experiment import Experiment


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("report")(report)
    app.command("cluster")(cluster)


def report(
    what: Annotated[
        list[str] | None, typer.Argument(help="Runs and experiments; none: every experiment.", metavar="{run|experiment}")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of a run: held-out tokens that its components are looked at on.", min=1)] = 20_000,
    shown: Annotated[int, typer.Option("--components", help="Of a run: components shown, of all sites together; 0: none.", min=0)] = 256,
    directory: Dir = None,
) -> None:
    """Write a page of an experiment, of a run with its components, or of the whole suite: one HTML file each.

    Without a name the tables of results/README.md and of the experiments' README.md are made again first.
    """
    from decomp_bench.report.experiments import experiment_page, suite_page

    if not what:
        from decomp_bench.experiment import all_experiments, experiments_folder
        from decomp_bench.report.summary import update

        known, root = all_experiments(directory), experiments_folder(directory).parent
        tables = update(root, known)  # first: the pages show them
        index, pages = suite_page(known, root)
        for path in (*pages, index, *tables):
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


SHOWN, NAMED = 20, 8
"""Clusters and members that are printed at most."""


def cluster(
    run: Annotated[str, typer.Argument(help="A run with a checkpoint.")],
    tokens: Annotated[int, typer.Option(help="Held-out tokens; time grows with them and with the cube of the components.", min=1)] = 4096,
    alpha: Annotated[float, typer.Option(help="Bits for each member of an active cluster: smaller makes larger clusters.", min=0)] = 1.0,
    threshold: Annotated[float, typer.Option(help="Gate above which a component is active.", min=0, max=1)] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Write all clusters to this .json file.")] = None,
    as_json: Json = False,
) -> None:
    """Group a run's components by where they are active together, as far as that shortens the description."""
    from decomp_bench import data, targets
    from decomp_bench.cli.display import Line, show
    from decomp_bench.clustering import cluster as clusters
    from decomp_bench.files import write_json
    from decomp_bench.runs import find

    if out is not None and out.suffix != ".json":
        raise UserError(f"--out takes a .json file; got '{out}'")
    config = (found := find(run)).config
    target = targets.load(config.target)
    decomposer, source = found.load(target), data.source(target, config.data)
    with Line() as line:
        made = clusters(decomposer, source, tokens, alpha, threshold, config.eval.split,
                        lambda done, parts: line({"phase": "merging", "step": done, "steps": parts}))  # fmt: skip
    if out is not None:
        write_json(made, out)
    if as_json:
        show([made], True)
        return
    rows = [{"members": len(one["members"]), "density": one["density"], "of": _named(one["members"])} for one in made["clusters"][:SHOWN]]
    show(rows, False)
    count, bits = len(made["clusters"]), f"{made['bits_before']:.4g} to {made['bits_after']:.4g} bits a position"
    print(f"{made['components']} components in {count} clusters, {bits}, at {made['positions']:,} positions")


def _named(members: list[str]) -> str:
    return ", ".join(members[:NAMED]) + (f", and {len(members) - NAMED} more" if len(members) > NAMED else "")
