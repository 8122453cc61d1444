"""An experiment's page, and the page of all experiments that have results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.errors import UserError
from decomp_bench.report import figures, provenance, readme, tables
from decomp_bench.report.page import NAME, link, write
from decomp_bench.report.tables import Table

if TYPE_CHECKING:
    import pandas as pd

    from decomp_bench.experiment import Experiment
    from decomp_bench.runs import Run

SECTIONS = ("Question", "Prediction", "Result", "Verdict")
INDEX = "index.html"
DATA_LIMIT = 20_000
"""Characters of a JSON file that a page shows."""


@dataclass
class Results:
    """One results folder, that of a target and preset, as a page shows it."""

    name: str
    command: str
    figures: list[figures.Picture]
    tables: list[Table]
    facts: provenance.Facts = field(default_factory=list)
    runs: Table | None = None
    failures: list[Table] = field(default_factory=list)
    data: list[tuple[str, str]] = field(default_factory=list)


def results_folders(experiment: Experiment) -> list[Path]:
    """The results folders of an experiment that hold something, by name."""
    folder = experiment.root / "results" / experiment.name
    places = sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
    return [path for path in places if any(path.glob("*.parquet")) or any(path.glob("*.csv")) or any(path.glob("figures/*.svg"))]


def page_of(experiment: Experiment) -> Path:
    """Where an experiment's page lies."""
    return experiment.root / "results" / experiment.name / NAME


def experiment_page(experiment: Experiment) -> Path:
    """Write the page of an experiment from its README and its results folders; raises UserError where there are no results."""
    from decomp_bench.runs import folder_at

    folders = results_folders(experiment)
    if not folders:
        raise UserError(f"{experiment.name} has no results: decomp-bench experiment run {experiment.name[:3]}")
    path = page_of(experiment)
    with folder_at(experiment.root / "results" / "runs"):
        shown = [_results(experiment, folder, path) for folder in folders]
    return write("experiment.html", path, experiment=experiment, sections=_sections(experiment), all_results=shown)


def _sections(experiment: Experiment) -> dict[str, Any]:
    found = readme.sections(experiment.path / "README.md")
    found.setdefault("Question", readme.html(experiment.config.question or "Not stated."))
    return {name: found[name] for name in SECTIONS if name in found}


def _results(experiment: Experiment, folder: Path, page: Path) -> Results:
    if (frame := _frame(experiment, folder)) is not None:
        return _gathered(experiment, folder, page, frame)
    named = [_shown(path) for path in sorted(folder.glob("*.json"))]
    files = {path.stem: path for kind in ("*.parquet", "*.csv") for path in sorted(folder.glob(kind))}
    found = [tables.from_file(path) for _, path in sorted(files.items())]
    default = experiment.config.preset or "default"
    preset = "" if folder.name == default else f" --preset {folder.name}"
    command = f"decomp-bench experiment run {experiment.name[:3]}{preset}"
    return Results(folder.name, command, figures.pictures(folder / "figures"), found, data=named)


def _shown(path: Path) -> tuple[str, str]:
    text = path.read_text()
    return path.name, text if len(text) <= DATA_LIMIT else f"{text[:DATA_LIMIT]}\n... {len(text) - DATA_LIMIT:,} further characters"


def _frame(experiment: Experiment, folder: Path) -> pd.DataFrame | None:
    """The results frame of a folder; None where it has none, as a program of its own may write tables of any shape."""
    from decomp_bench import results

    path = folder / "results.parquet"
    if not path.is_file():
        return None
    try:
        return results.read(path)
    except ValueError as error:
        if experiment.config.script:
            return None
        raise UserError(str(error)) from None


def _gathered(experiment: Experiment, folder: Path, page: Path, frame: pd.DataFrame) -> Results:
    from decomp_bench.runs import runs_folder

    about = _manifest(folder)
    manifests = about.get("runs", {})
    target, preset = str(about.get("target", frame["target"].iloc[0])), about.get("preset")
    seeds = tuple(sorted({int(seed) for seed in frame["seed"].dropna().unique()}))
    failures = [table for table in (_unfinished(experiment, target, preset, seeds, set(manifests)), tables.without_value(frame)) if table]
    return Results(
        folder.name,
        _command(experiment, target, preset, seeds),
        figures.pictures(folder / "figures"),
        [tables.points(frame)],
        provenance.facts(list(manifests.values()), frame),
        provenance.runs_table(manifests, page, runs_folder()) if manifests else None,
        failures,
    )


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}


def _command(experiment: Experiment, target: str, preset: str | None, seeds: Sequence[int]) -> str:
    """What makes these results again."""
    config = experiment.config
    parts = [f"decomp-bench experiment run {experiment.name[:3]}"]
    parts += [f"--preset {preset}"] if preset and preset != config.preset else []
    parts += [f"--target {target}"] if target != config.target else []
    parts += [f"--seeds {','.join(map(str, seeds))}"] if seeds and tuple(seeds) != config.seeds else []
    return " ".join(parts)


# ---- failures


def _unfinished(experiment: Experiment, target: str, preset: str | None, seeds: tuple[int, ...], done: set[str]) -> Table | None:
    """Runs of the experiment that failed or stopped, and are in no result."""
    from decomp_bench.experiment import Options, configs
    from decomp_bench.runs import all_runs

    try:
        wanted = configs(experiment, Options(preset, seeds=seeds, target=target))
    except UserError:  # the config has changed since
        return None
    stopped = [run for run in all_runs() if run.id not in done and run.status in ("failed", "interrupted")]
    rows = [{"run": run.id, "status": run.status, "error": _error(run)} for run in stopped if any(_fits(run, one) for one in wanted)]
    return tables.plain("Failed or interrupted runs", rows) if rows else None


def _error(run: Run) -> str:
    try:
        return run.manifest.get("error") or ""
    except UserError as error:
        return str(error)


def _fits(run: Run, wanted: Any) -> bool:
    """Whether a run's config is one that the experiment asks for, its defaults filled in."""
    try:
        config = run.config
    except UserError:
        return False
    given, full = wanted.method_config, config.method_config
    alike = all(getattr(config, name) == getattr(wanted, name) for name in ("method", "target", "seed", "data", "eval"))
    return alike and all(full.get(key) == value for key, value in given.items())


# ---- all experiments


def suite_page(experiments: Sequence[Experiment], root: Path) -> tuple[Path, list[Path]]:
    """Write the page of every experiment with results, then the page that leads to them; raises UserError where none has results."""
    path, entries, pages = root / "results" / INDEX, [], []
    for one in experiments:
        if not results_folders(one):
            continue
        page = experiment_page(one)
        found = [picture for folder in results_folders(one) for picture in figures.pictures(folder / "figures")[:1]]
        pages.append(page)
        entries.append(
            {
                "experiment": one,
                "sections": _sections(one),
                "address": link(path, page),
                "folders": [folder.name for folder in results_folders(one)],
                "figure": found[0] if found else None,
            }
        )
    if not entries:
        first = f"decomp-bench experiment run {experiments[0].name[:3]}" if experiments else "decomp-bench experiment new NAME"
        raise UserError(f"no experiment has results yet: {first}")
    without = [one for one in experiments if not results_folders(one)]
    return write("suite.html", path, entries=entries, without=without, runs=_run_links(root, path)), pages


def _run_links(root: Path, path: Path) -> list[tuple[str, str]]:
    """Name and address of every run that has a page."""
    from decomp_bench.runs import folder_at, runs_folder

    with folder_at(root / "results" / "runs"):
        return [(page.parent.name, link(path, page)) for page in sorted(runs_folder().glob(f"*/{NAME}"))]
