"""list methods|targets|metrics|measurements|runs|experiments|formats, show RUN, runs list|rm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decomp_bench.cli.exchange import formats
from decomp_bench.cli.training import Json
from decomp_bench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from decomp_bench.runs import Run


COLUMNS = ("method", "summary", "kind", "trained", "inference sweep", "presets", "paper")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(
        help="List methods, targets, metrics, measurements, runs, experiments, formats.", no_args_is_help=True, rich_markup_mode=None
    )
    for command in (methods, targets, metrics, measurements, runs, experiments, formats):
        group.command(command.__name__)(command)
    app.add_typer(group, name="list")
    app.command("show")(show_run)
    own = typer.Typer(help="Run folders: list, rm.", no_args_is_help=True, rich_markup_mode=None)
    own.command("list")(runs)
    own.command("rm")(remove)
    app.add_typer(own, name="runs")


def methods(as_json: Json = False) -> None:
    """Every method: what it is, what it can be asked, its config keys and its paper."""
    from decomp_bench import registry
    from decomp_bench.cli.display import show
    from decomp_bench.config import field_docs

    rows = []
    for name in registry.names():
        try:
            kind = registry.method(name)
        except Exception as error:  # one broken file must not hide the others
            rows.append({**dict.fromkeys(COLUMNS, ""), "method": name, "summary": f"BROKEN: {str(error).splitlines()[0]}"})
            continue
        row: dict[str, Any] = {"method": name, "summary": kind.summary, "kind": kind.kind, "trained": "yes" if kind.trainable else "no"}
        row |= {"inference sweep": list(kind.swept), "presets": sorted(getattr(kind, "presets", {})), "paper": kind.paper}
        if as_json:
            row |= {"version": kind.version, "trains_on": kind.trains_on, "config": field_docs(kind.Config)}
        rows.append(row)
    show(rows, as_json)


def targets(as_json: Json = False) -> None:
    """Every target by name, and the forms of those that you bring."""
    from decomp_bench.cli.display import show
    from decomp_bench.targets import known

    show(known(), as_json)


def metrics(
    directory: Annotated[Path | None, typer.Option("--dir", help="Folder that holds experiments/ and results/.")] = None,
    as_json: Json = False,
) -> None:
    """Every metric: its definition, unit, direction, what it is blind to, and the reseed noise that results at hand show."""
    from decomp_bench.cli.display import show
    from decomp_bench.metrics import metric_catalogue

    noise = _noise(directory)
    rows = [{**row, "noise": noise.get(row["key"], [])} for row in metric_catalogue()]
    if as_json:
        show(rows, True)
        return
    brief = ("key", "title", "unit", "direction", "formula", "blind", "version")
    show([{name: row.get(name) for name in brief} | (_briefly(row["noise"]) if noise else {}) for row in rows], False)
    if noise:
        first = next(iter(noise.values()))[0]
        print(
            "\nreseed sd, and the smallest difference of two single runs and of two means of three seeds that it lets resolve (95%): all\n"
            f"trained families together, {first['protocol']}, gates {first['gates']}, {first['results']} where it has the metric; "
            "the rest: --json"
        )


def _noise(directory: Path | None) -> dict[str, list[dict[str, Any]]]:
    """What is known of reseed noise; nothing where there is no project here and none was named."""
    from decomp_bench.experiment import experiments_folder
    from decomp_bench.noise import known_noise

    try:
        folder = experiments_folder(directory)
    except UserError:
        if directory is not None:
            raise
        return {}
    return known_noise(folder.parent)


def _briefly(noise: list[dict[str, Any]]) -> dict[str, Any]:
    names = {"sd": "reseed sd", "resolved_1": "1 seed", "resolved_3": "3 seeds"}
    return {shown: noise[0][name] if noise else None for name, shown in names.items()}


def measurements(as_json: Json = False) -> None:
    """What experiments can measure of their runs beyond the metrics: each of its own metrics, and its settings."""
    from dataclasses import asdict

    from decomp_bench import measurements as known
    from decomp_bench.cli.display import show
    from decomp_bench.config import field_docs

    rows = []
    for name in known.names():
        found = known.measurement(name)
        own = {"settings": field_docs(found.Settings)} if as_json else {}
        rows += [{"measurement": name, **asdict(metric), "version": found.version, **own} for metric in found.metrics]
    show(rows, as_json)


def run_rows() -> list[dict[str, Any]]:
    """One entry for each run folder."""
    from decomp_bench.runs import all_runs

    rows = []
    for run in all_runs():
        try:
            manifest = run.manifest
        except UserError:
            manifest = {}
        cost = manifest.get("cost", {})
        rows.append(
            {
                "run": run.id,
                "status": run.status,
                "created": manifest.get("created"),
                "train_s": cost.get("train_wall_s"),
                "mb": round(folder_size(run.path) / 1e6, 1),
                "error": manifest.get("error"),
            }
        )
    return rows


def folder_size(path: Path) -> int:
    """Bytes of every file under a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def runs(as_json: Json = False) -> None:
    """Every run folder, oldest first."""
    from decomp_bench.cli.display import show

    show(run_rows(), as_json, "no runs yet; make one: decomp-bench train transcoder")


def experiments(
    directory: Annotated[Path | None, typer.Option("--dir", help="Folder that holds experiments/.")] = None, as_json: Json = False
) -> None:
    """Every experiment."""
    from decomp_bench.cli.experiments import list_

    list_(directory, as_json)


def show_run(run: Annotated[str, typer.Argument(help="An id, or its beginning.")], as_json: Json = False) -> None:
    """A run: its state, what it was made with, what it cost, what was measured."""
    from decomp_bench.cli.display import summary
    from decomp_bench.runs import find

    found = find(run)
    manifest = {**found.manifest, "status": found.status, "path": str(found.path)}
    if as_json:
        print(json.dumps({**manifest, "config": found.config.model_dump(mode="json")}, indent=2, default=str))
        return
    for line in _lines(found, manifest):
        print(line)
    if found.evaluated:
        summary(frame := found.results())
        for line in _recovered(frame):
            print(line)
    elif found.trained:
        print(f"next: decomp-bench eval {found.id}")
    else:
        print(f"next: {found.resume_command}")


def _recovered(frame: pd.DataFrame) -> list[str]:
    """The run's own points on the training curve of its target, one line; none where no curve was kept."""
    from decomp_bench.training_curve import compute_recovered

    found = compute_recovered(frame[(frame["curve"] == "trained") & (frame["gates"] == "clean") & (frame["layer"] == "all")])
    known = found[found["value"].notna() & (found["site"] == "all")]
    shares = [f"{row['protocol']} {row['value']:.1%} ({row['lo']:.1%} to {row['hi']:.1%})" for row in known.to_dict("records")]
    return [f"compute recovered, of the target's training (clean gates): {', '.join(shares)}"] if shares else []


def _lines(run: Run, manifest: dict[str, Any]) -> list[str]:
    cost, git = manifest.get("cost", {}), manifest.get("git", {})
    commit = f"{(git.get('commit') or 'unknown')[:12]}{' with changes' if git.get('dirty') else ''}"
    error = f": {manifest['error']}" if manifest.get("error") else ""
    lines = [
        f"run      {run.id}",
        f"status   {manifest['status']}{error}",
        f"folder   {run.path}",
        f"code     {commit}, method version {manifest.get('method_version')}",
        f"data     {manifest.get('corpus')} {manifest.get('corpus_hash')}; target {manifest.get('target_hash')}",
    ]
    if cost:
        lines.append("cost     " + ", ".join(f"{key} {value:,.6g}" for key, value in cost.items() if isinstance(value, (int, float))))
    config = run.config
    return [*lines, "config   " + ", ".join(f"{key}={value}" for key, value in config.method_config.items())]


def remove(
    run: Annotated[list[str], typer.Argument(help="Ids, or their beginnings.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete run folders."""
    from decomp_bench.runs import find

    found = {one.id: one for one in map(find, run)}
    if not yes:
        size = sum(folder_size(one.path) for one in found.values()) / 1e6
        if not typer.confirm(f"delete {len(found)} run(s), {size:.1f} MB: {', '.join(found)}?"):
            print("nothing deleted")
            return
    for one in found.values():
        one.remove()
        print(f"deleted {one.id}")
