"""Experiments: a folder NNN_name with a config.yaml -> the runs that are missing -> one results folder for each target."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from decomp_bench.config import Config, DataConfig, EvalConfig, RunConfig, TrainConfig, merge, parse, parse_set, read_yaml
from decomp_bench.costs import apart, default_workers, estimate
from decomp_bench.errors import UserError
from decomp_bench.gather import check_figures, collect, draw
from decomp_bench.measure import errors, missing
from decomp_bench.measurements import Asked, asked
from decomp_bench.registry import suggest
from decomp_bench.runs import Existing, ResolvedRun, Run, folder_at, resolve, runs_folder, target_slug

if TYPE_CHECKING:
    import pandas as pd

    from decomp_bench.workers import Overview


class RunSpec(Config):
    """Runs of one method: a config, and the values that are swept."""

    method: str
    layers: tuple[int, ...] | Literal["all"] = "all"
    config: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    """Config key -> values; several keys span their product."""
    seeds: tuple[int, ...] = ()
    """Of the experiment's seeds only these, for runs that cost far more than the others; `--seeds` goes before it."""
    at: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """`key=value` of a swept value -> settings of that point alone (`eval`, say a sweep at inference)."""
    condition: dict[str, str] = Field(default_factory=dict)
    """What the experiment's figures tell these runs apart by, such as `trained: "{train_on}"`, where a brace names a config key. It stands
    in the column `condition` of the experiment's results; no run's id depends on it."""
    presets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Preset -> what it changes in this entry (`config`, `sweep`, `layers`, `at`, `seeds`)."""


class ExperimentConfig(Config):
    """What a config.yaml holds."""

    title: str
    question: str = ""
    target: str = "pydocs-4l"
    seeds: tuple[int, ...] = (0,)
    preset: str | None = None
    """The preset where none is named; its results lie in the target's folder, those of others in TARGET-PRESET."""
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    train: TrainConfig = TrainConfig()
    runs: tuple[RunSpec, ...] = ()
    script: str | None = None
    """File beside config.yaml whose `main(settings, folder)` is the experiment, instead of runs."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What a script is given; presets change it."""
    measure: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Measurement -> settings: what every run gets once it is evaluated. No run's id depends on it."""
    figures: tuple[str, ...] = ()
    """What is drawn of the runs (`decomp_bench.analysis.DRAWINGS`); none: sparsity against fidelity, or what was measured."""
    presets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Preset -> what it changes in this file (`seeds`, `data`, `eval`, `train`, `settings`, `measure`)."""

    @model_validator(mode="after")
    def _something_to_do(self) -> ExperimentConfig:
        if bool(self.runs) == bool(self.script):
            raise ValueError("give either runs or a script")
        if (self.measure or self.figures) and self.script:
            raise ValueError("measure and figures are for runs, and a script has none")
        return self


@dataclass(frozen=True)
class Experiment:
    """An experiment's folder and its config."""

    path: Path
    config: ExperimentConfig
    raw: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as 011_pareto_trained."""
        return self.path.name

    @property
    def root(self) -> Path:
        """The folder that holds experiments/ and results/."""
        return self.path.parent.parent

    def results_folder(self, target: str, preset: str | None) -> Path:
        """Where the results on a target lie."""
        suffix = "" if preset == self.config.preset or preset is None else f"-{preset}"
        return self.root / "results" / self.name / f"{target_slug(target)}{suffix}"


@dataclass(frozen=True)
class Options:
    """What the command line can change about an experiment."""

    preset: str | None = None
    only: tuple[str, ...] = ()
    """Methods, or values of conditions, of the wanted runs; empty: all."""
    seeds: tuple[int, ...] = ()
    target: str | None = None
    set: tuple[str, ...] = ()
    workers: int | None = None
    """Worker processes; None: one for each core; 0: this process alone."""
    existing: Existing = "resume"


@dataclass
class Plan:
    """Every run of an experiment under given options, named, and which of them are wanted now."""

    experiment: Experiment
    preset: str | None
    target: str
    wanted: list[ResolvedRun]
    left_out: list[str] = field(default_factory=list)
    every: set[str] = field(default_factory=set)
    """Ids of all methods and seeds that the results folder may hold: those of earlier calls as well."""
    measure: list[Asked] = field(default_factory=list)
    """What every run is given once it is evaluated."""
    conditions: dict[str, str] = field(default_factory=dict)
    """Run id -> what the experiment's figures tell the run apart by, as results have it."""

    @property
    def folder(self) -> Path:
        """The results folder."""
        return self.experiment.results_folder(self.target, self.preset)


@dataclass
class Outcome:
    """What an experiment gave."""

    plan: Plan
    frame: pd.DataFrame | None
    executed: int
    failures: list[str]
    figures: list[Path]


# ---- finding


def experiments_folder(directory: Path | None) -> Path:
    """The folder of experiments: DIR/experiments or DIR itself, else ./experiments; raises UserError where there is none."""
    if directory is not None:
        for folder in (directory / "experiments", directory):
            if folder.is_dir() and _numbered(folder):
                return folder.resolve()
        raise UserError(f"no experiments in {directory}: --dir takes the folder that holds NNN_name folders with a config.yaml")
    if Path("experiments").is_dir():
        return Path("experiments").resolve()
    raise UserError("no ./experiments here: change to the project's folder, or name one with --dir")


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.match(r"\d{3}_", path.name) and (path / "config.yaml").is_file())


def all_experiments(directory: Path | None = None) -> list[Experiment]:
    """Every experiment, by number."""
    return [load(str(path)) for path in _numbered(experiments_folder(directory))]


def load(name: str, directory: Path | None = None) -> Experiment:
    """An experiment by number, by name, or by its folder's path; raises UserError where there is none or its config is broken."""
    path = Path(name)
    if not (path / "config.yaml").is_file() or (directory is not None and not path.is_absolute()):
        folder = experiments_folder(directory)
        found = [one for one in _numbered(folder) if name in (one.name, one.name[:3], one.name[4:])]
        if not found:
            raise UserError(f"no experiment '{name}' in {folder}; {suggest(name, [one.name for one in _numbered(folder)])}")
        path = found[0]
    raw = read_yaml(path / "config.yaml")
    return Experiment(path.resolve(), parse(ExperimentConfig, raw, str(path / "config.yaml")), raw)


# ---- planning


MEASURE = "measure."
"""What `--set` items for measurements begin with; the others are for runs."""


def _of_preset(experiment: Experiment, options: Options) -> tuple[ExperimentConfig, str | None, str]:
    """The config under the chosen preset, the preset, and where both are from."""
    where = str(experiment.path / "config.yaml")
    preset = options.preset or experiment.config.preset
    named = set(experiment.config.presets) | {name for spec in experiment.config.runs for name in spec.presets}
    if preset is not None and preset not in named:
        raise UserError(f"{where} has no preset '{preset}'; {suggest(preset, sorted(named)) if named else 'it has none'}")
    chosen = experiment.config.presets.get(preset, {}) if preset else {}
    return parse(ExperimentConfig, merge(experiment.raw, chosen), f"{where}, preset {preset}"), preset, where


def measurements(experiment: Experiment, options: Options) -> list[Asked]:
    """The measurements of the chosen preset; raises UserError for an unknown one, key or value."""
    whole, _, where = _of_preset(experiment, options)
    points = parse_set([item for item in options.set if item.startswith(MEASURE)])
    if len(points) > 1:
        raise UserError(f"--set {MEASURE}* takes one value for each key; a list is written [a,b]")
    over = points[0].get("measure", {})
    if not isinstance(over, dict) or not all(isinstance(settings, dict) for settings in over.values()):
        raise UserError(f"--set {MEASURE}NAME.KEY=VALUE changes a measurement's setting")
    return asked(merge(whole.measure, over), where)


def configs(experiment: Experiment, options: Options) -> list[RunConfig]:
    """The configs of every wanted run; raises UserError for an unknown preset, method or key."""
    return [config for config, _ in _conditioned(experiment, options)]


def _conditioned(experiment: Experiment, options: Options) -> list[tuple[RunConfig, str]]:
    """The config of every wanted run, and its condition in words."""
    whole, preset, where = _of_preset(experiment, options)
    sets = tuple(item for item in options.set if not item.startswith(MEASURE))
    named = [(spec.method, *spec.condition.values()) for spec in whole.runs]
    for name in options.only:
        if not any(name in names for names in named):
            raise UserError(f"--only {name}: no run's method or condition; {suggest(name, sorted(set(itertools.chain(*named))))}")
    common = whole.model_dump(mode="json", include={"data", "eval", "train"})
    common["target"] = options.target or whole.target
    made = []
    for spec, names in zip(whole.runs, named, strict=True):
        if not options.only or set(names) & set(options.only):
            spec = _spec_of_preset(spec, preset, where)
            own = tuple(seed for seed in whole.seeds if not spec.seeds or seed in spec.seeds)
            made += _spec_configs(spec, common, options.seeds or own, sets, where)
    return made


def _spec_of_preset(spec: RunSpec, preset: str | None, where: str) -> RunSpec:
    raw = spec.model_dump(mode="json", exclude={"presets"})
    return parse(RunSpec, merge(raw, spec.presets.get(preset, {}) if preset else {}), f"{where}, preset {preset} of {spec.method}")


def _spec_configs(
    spec: RunSpec, common: dict, seeds: tuple[int, ...], sets: tuple[str, ...], where: str
) -> list[tuple[RunConfig, str]]:
    points: list[dict[str, Any]] = [spec.config]
    for key, values in spec.sweep.items():
        points = [{**point, key: value} for point in points for value in values]
    made = []
    for seed in seeds:
        for point in points:
            base = {**common, "method": spec.method, "layers": spec.layers, "seed": seed, "method_config": point}
            for key, value in point.items():
                base = merge(base, spec.at.get(f"{key}={value}", {}))
            for over in parse_set(list(sets)):
                config = parse(RunConfig, merge(base, over), where if not sets else f"{where} with --set")
                made.append((config, _in_words(spec, config, where)))
    return made


def _in_words(spec: RunSpec, config: RunConfig, where: str) -> str:
    if not spec.condition:
        return ""
    from decomp_bench.results import condition

    try:
        return condition(**{key: text.format(**config.method_config) for key, text in spec.condition.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{where}: condition of {spec.method}: {error} is no key of its config or sweep") from None


def plan(experiment: Experiment, options: Options) -> Plan:
    """Name every wanted run, which takes the target and its data; methods that do not apply are left out, with the reason."""
    from decomp_bench import data, targets

    conditioned = _conditioned(experiment, options)
    wanted = [config for config, _ in conditioned]
    if len({(config.target, config.data) for config in wanted}) > 1:
        raise UserError("an experiment runs on one target and one data set at a time; give target and data one value each")
    made = Plan(experiment, options.preset or experiment.config.preset, wanted[0].target if wanted else experiment.config.target, [])
    made.measure = measurements(experiment, options)
    check_figures(experiment.config.figures, str(experiment.path / "config.yaml"))
    target = targets.load(made.target)
    source = data.source(target, wanted[0].data)
    made.wanted = _resolved(conditioned, target, source, made)
    seeds = {*experiment.config.seeds, *options.seeds, *_seeds_in(made.folder)}
    whole = _conditioned(experiment, Options(made.preset, seeds=tuple(sorted(seeds)), target=options.target))
    everything = _resolved(whole, target, source, made, strict=False) if not options.set else []
    made.every = {one.id for one in (*everything, *made.wanted)}
    return made


def _resolved(wanted: Sequence[tuple[RunConfig, str]], target: Any, source: Any, made: Plan, strict: bool = True) -> list[ResolvedRun]:
    """The runs by name; their conditions, and what is left out of those that are strictly wanted, are noted in the plan."""
    from decomp_bench.registry import method

    found: dict[str, ResolvedRun] = {}
    for config, words in wanted:
        try:
            reason = method(config.method).skip(target, target.layer_tuple(config.layers))
            if reason:
                made.left_out += [f"{config.method}: {reason}"] if strict else []
                continue
            one = resolve(config, target, source, "the experiment")
            found[one.id] = one
            made.conditions.setdefault(one.id, words)
        except Exception:  # a method that nobody asked for may be broken
            if strict:
                raise
    made.left_out[:] = dict.fromkeys(made.left_out)
    return list(found.values())


def _seeds_in(folder: Path) -> set[int]:
    from decomp_bench import results

    try:
        return {int(seed) for seed in results.read(folder / "results.parquet")["seed"].dropna().unique()}
    except ValueError:
        return set()


def status(plan: Plan) -> list[dict[str, Any]]:
    """One entry for each wanted run: id, status (missing where nothing is there yet, unmeasured where it has no rows of a measurement)
    and the estimated seconds of what is left to do."""
    rows = []
    for one in plan.wanted:
        run = Run(runs_folder() / one.id)
        there = run.path.is_dir()
        lacking = missing(run, plan.measure)
        state = run.status if there else "missing"
        done = state == "done" and run.evaluated
        rows.append(
            {
                "id": one.id,
                "method": one.config.method,
                "seed": one.config.seed,
                "status": "unmeasured" if done and lacking else state,
                "seconds": round((0 if done else estimate(one.config)) + sum(one.seconds for one in lacking)),
                "path": str(run.path) if there else "",
            }
        )
    return rows


# ---- running


def run(experiment: Experiment, options: Options, report: Callable[[Overview], None] | None = None) -> Outcome:
    """Execute the missing runs in workers and gather the results; a run that fails is reported, not raised."""
    with folder_at(experiment.root / "results" / "runs"):
        made = plan(experiment, options)
        todo = {one.id: row for one, row in zip(made.wanted, status(made), strict=True) if not _settled(row, options.existing)}
        failures = _execute(made, todo, options, report) if todo else []
        frame = collect(made)
        figures: list[Path] = []
        try:
            figures = draw(made.folder) if frame is not None else []
        except UserError as error:  # the results stand without their figures
            failures.append(f"figures: {error}")
    return Outcome(made, frame, len(todo), failures, figures)


def _execute(made: Plan, todo: dict[str, dict[str, Any]], options: Options, report: Callable[[Overview], None] | None) -> list[str]:
    """Execute runs in workers; returns what failed, one line each."""
    from decomp_bench.workers import chunked, launch

    wanted = [one for one in made.wanted if one.id in todo]
    measuring = sum(one.seconds for one in made.measure)
    whole = options.existing == "overwrite"
    seconds = {id(one.config): (estimate(one.config) + measuring if whole else max(1.0, todo[one.id]["seconds"])) for one in wanted}
    workers = default_workers(wanted[0].config.train) if options.workers is None else options.workers
    groups = chunked([one.config for one in wanted], lambda config: seconds[id(config)], apart, workers)
    for group in groups:
        group.measuring = min(1.0, len(group.configs) * measuring / group.cost)
    settings = {one.name: one.settings.model_dump(mode="json") for one in made.measure}
    launch(groups, workers, options.existing, made.experiment.name, report, settings)
    failures = [f"{group.label}: {group.error}" for group in groups if group.error]
    for run in [run for group in groups for run in group.runs]:
        failures += [f"{run.id}: {run.manifest.get('error')}"] if run.status == "failed" else errors(run)
    return failures


def _settled(row: dict[str, Any], existing: Existing) -> bool:
    if row["status"] == "missing" or existing == "overwrite":
        return False
    if existing == "error":
        raise UserError(f"run {row['id']} exists; use --existing resume, skip or overwrite")
    if existing == "skip":
        return row["status"] != "unmeasured"
    return row["status"] == "done" and Run(Path(row["path"])).evaluated
