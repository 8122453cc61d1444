"""One results folder for each experiment and target: the rows of its runs, what they were made with, and the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.errors import UserError
from decomp_bench.files import write_json
from decomp_bench.noise import write_noise
from decomp_bench.registry import suggest
from decomp_bench.runs import Run, runs_folder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from decomp_bench.experiment import Plan

FIGURES_OF = ("ce_delta", "output_mse", "fvu")
DOCUMENTS_LIMIT = 4_000_000
"""Bytes of per-document results that are kept beside an experiment's results; more stays in the run folders."""


def collect(plan: Plan) -> pd.DataFrame | None:
    """Gather every finished run of the experiment into its results folder. Rows of runs that no longer belong to it are dropped.

    Rows that were already there stay where their run is still one that this config, code and data would make.
    """
    import pandas as pd

    from decomp_bench import results

    done = [run for run in (Run(runs_folder() / one) for one in sorted(plan.every)) if run.path.is_dir() and run.evaluated]
    frames = [one.results() for one in done]
    try:
        before = results.read(plan.folder / "results.parquet")
        frames.append(before[before["run_id"].isin(plan.every - {one.id for one in done})])
    except ValueError:
        pass
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        return None
    frame = pd.concat(frames, ignore_index=True).assign(experiment=plan.experiment.name)
    words = frame["run_id"].map(plan.conditions).fillna(frame["condition"]).fillna("")
    frame = frame.assign(condition=words).astype({"experiment": "string", "condition": "string"})
    frame = frame.sort_values(["method", "run_id"], kind="stable", ignore_index=True)
    results.write(frame, plan.folder / "results.parquet")
    whole = (frame["layer"] == "all") & (frame["site"] == "all")  # the CSV is for reading; every layer and site is in the parquet
    results.write(frame[whole], plan.folder / "results.csv")
    _collect_documents(done, plan.folder)
    _collect_measurements(done, plan)
    _collect_manifests(done, plan, set(frame["run_id"]))
    return frame


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a results folder, empty where there is none that can be read."""
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _collect_measurements(done: list[Run], plan: Plan) -> None:
    """NAME.parquet and NAME.csv of every measurement: the rows of all runs that have them, those about the target once.

    Rows that were there stay, as for results, where they were made with the same settings and version.
    """
    import pandas as pd

    from decomp_bench import analysis, results

    before = _manifest(plan.folder).get("measurements", {})
    for one in plan.measure:
        frames = [results.read(one.file(run.path)) for run in done if one.file(run.path).is_file()]
        path = plan.folder / f"{one.name}.parquet"
        if before.get(one.name, {}).get("key") == one.key and path.is_file():
            kept = results.read(path)
            frames.append(kept[kept["run_id"].fillna("").isin({"", *plan.every} - {run.id for run in done})])
        frames = [frame for frame in frames if len(frame)]
        if frames:
            frame = pd.concat(frames, ignore_index=True).drop_duplicates(ignore_index=True)
            words = frame["run_id"].map(plan.conditions).fillna("")  # the column `condition` is the measurement's own
            frame["family"] = analysis.told_apart(frame.assign(condition=words))["family"]
            of_target = frame["run_id"].fillna("") == ""
            frame["experiment"] = frame["experiment"].mask(~of_target, plan.experiment.name)
            frame = frame.sort_values(["method", "run_id"], kind="stable", ignore_index=True)
            results.write(frame, path)
            results.write(frame, path.with_suffix(".csv"))


def _collect_documents(done: list[Run], folder: Path) -> None:
    """Per-document results beside the others where they are small; a file that would be incomplete or too large is not left there."""
    import pandas as pd

    from decomp_bench import results

    path = folder / "documents.parquet"
    files = [run.path / "documents.parquet" for run in done if (run.path / "documents.parquet").is_file()]
    path.unlink(missing_ok=True)
    if files and sum(file.stat().st_size for file in files) <= 2 * DOCUMENTS_LIMIT:
        results.write(pd.concat([pd.read_parquet(file) for file in files], ignore_index=True), path)
        if path.stat().st_size > DOCUMENTS_LIMIT:
            path.unlink()


def _collect_manifests(done: list[Run], plan: Plan, kept: set[str]) -> None:
    """manifest.json: for every run in the results its manifest and config, so that the run folders need not be kept."""
    runs = {key: value for key, value in _manifest(plan.folder).get("runs", {}).items() if key in kept}
    runs |= {one.id: about(one) for one in done}
    made: dict[str, Any] = {"experiment": plan.experiment.name, "preset": plan.preset, "target": plan.target, "runs": runs}
    if plan.experiment.config.figures:
        made["figures"] = list(plan.experiment.config.figures)
    if plan.measure:
        made["measurements"] = {
            one.name: {"key": one.key, "version": one.measurement.version, "settings": one.settings.model_dump(mode="json")}
            for one in plan.measure
        }
    write_json(made, plan.folder / "manifest.json")


def about(run: Run) -> dict[str, Any]:
    """A run's manifest with its config and the size of its weights."""
    return {**run.manifest, "config": run.config.model_dump(mode="json"), "parameters": run.parameters}


def at_hand(root: Path) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Rows and manifests (as in `about`) of every finished run: of results folders under ROOT/results, then of run folders.

    A run that is in several places counts once. Raises UserError where there is none.
    """
    import pandas as pd

    from decomp_bench import results
    from decomp_bench.runs import all_runs

    done = {run.id: run for run in all_runs() if run.evaluated and run.status == "done"}
    frames, manifests = [], {}
    for file in sorted((root / "results").glob("*/*/manifest.json")):
        found = {name: one for name, one in _manifest(file.parent).get("runs", {}).items() if name not in manifests}
        if found and (file.parent / "results.parquet").is_file():
            frame = results.read(file.parent / "results.parquet")
            frames.append(frame[frame["run_id"].isin(found.keys())])
            manifests |= found
    frames += [run.results() for name, run in done.items() if name not in manifests]
    if not frames:
        raise UserError("no runs at hand: run an experiment first, such as decomp-bench experiment run 000")
    return pd.concat(frames, ignore_index=True), manifests | {name: about(run) for name, run in done.items()}


def measured_in(folder: Path) -> dict[str, pd.DataFrame]:
    """The rows of every measurement in a results folder, by name."""
    from decomp_bench import results

    names = sorted(_manifest(folder).get("measurements", {}))
    return {name: results.read(folder / f"{name}.parquet") for name in names if (folder / f"{name}.parquet").is_file()}


def check_figures(names: Sequence[str], where: str) -> None:
    """Raise UserError for a figure that is none."""
    if names:
        from decomp_bench import analysis

        for name in names:
            if name not in analysis.DRAWINGS:
                raise UserError(f"{where}: no figure '{name}'; {suggest(name, sorted(analysis.DRAWINGS))}")


def draw(folder: Path) -> list[Path]:
    """Draw every figure of a results folder into its figures/, and write the tables that go with them beside the results.

    Among them, where several seeds were run, how far they fall apart. Raises UserError where there is nothing to draw.
    """
    try:
        write_noise(folder, _manifest(folder).get("runs", {}))
    except ValueError as error:
        raise UserError(str(error)) from None
    return _figures(folder)


def _figures(folder: Path) -> list[Path]:
    import pandas as pd

    from decomp_bench import analysis, results

    try:
        if names := _manifest(folder).get("figures", []):
            check_figures(names, str(folder / "manifest.json"))
            return _drawings(folder, names)
        figures = {}
        for name, table in (measured := measured_in(folder)).items():
            if brief := analysis.measured_table(name, table):
                results.write(pd.DataFrame(brief), folder / f"{name}_brief.csv")
            figures |= analysis.measured_figures(name, table)
        frame = results.read(folder / "results.parquet")
        trained = frame[frame["curve"] == "trained"].groupby(["family", "condition"])["variant"]
        if not measured or (trained.nunique() > 1).any():  # one point a family makes no curve
            figures |= _curves(frame)
    except ValueError as error:
        raise UserError(str(error)) from None
    return [path for name, figure in figures.items() for path in analysis.save(figure, folder / "figures" / name)]


def _curves(frame: pd.DataFrame) -> dict[str, Figure]:
    from decomp_bench import analysis

    protocols = [name for name in analysis.PROTOCOLS if name in set(frame["protocol"])]
    drawn = frame["curve"].isin(("trained", "floor")) & (frame["applicable"] != "no") & frame["value"].notna()
    there = set(frame[drawn]["metric"])
    xs, ys = (tuple(name for name in names if name in there) for names in (analysis.XS, FIGURES_OF))
    figures = analysis.paretos(frame, xs=xs or analysis.XS, ys=ys, view=analysis.View(protocols=tuple(protocols)))
    narrow = tuple(f"_{protocol}" for protocol in protocols if protocol != "cascading")  # one for each pair of axes is enough
    return {name: figure for name, figure in figures.items() if not name.endswith(narrow)}


def _drawings(folder: Path, names: Sequence[str]) -> list[Path]:
    from decomp_bench import analysis, results

    frame = results.read(folder / "results.parquet")
    paths: list[Path] = []
    for name in names:
        drawing = analysis.DRAWINGS[name](frame)
        for stem, table in drawing.tables.items():
            for kind in ("parquet", "csv"):
                results.write(table, folder / f"{stem}.{kind}")
        for stem, figure in drawing.figures.items():
            paths += analysis.save(figure, folder / "figures" / stem)
    return paths
