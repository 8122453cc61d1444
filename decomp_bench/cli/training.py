"""train, eval, compare, align, audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decomp_bench.errors import RunFailed, UserError

if TYPE_CHECKING:
    import pandas as pd

    from decomp_bench.config import RunConfig
    from decomp_bench.runs import Existing, Run

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as method.k=16; method.k=8,16,32 is a sweep. Repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command, name in ((train, "train"), (evaluate, "eval"), (compare, "compare"), (align, "align"), (audit, "audit")):
        app.command(name)(command)


def train(
    method: Annotated[str | None, typer.Argument(help="A method of `list methods`; not needed with --config.")] = None,
    target: Annotated[str | None, typer.Option(help="A target of `list targets`.")] = None,
    layers: Annotated[str | None, typer.Option(help="all, or layers such as 0,2.")] = None,
    preset: Annotated[str | None, typer.Option(help="A preset of the method, such as smoke, laptop or paper (list methods).")] = None,
    config: Annotated[Path | None, typer.Option(help="A config file, such as that of an earlier run.")] = None,
    set_: Sets = None,
    seed: Annotated[int | None, typer.Option(help="Training seed.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    existing: Annotated[str, typer.Option(help="What to do about runs that exist: resume, skip, overwrite or error.")] = "resume",
    wandb: Annotated[str | None, typer.Option(help="off, offline or online.")] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Train only.")] = False,
) -> None:
    """Train a decomposition and score it. The same command again continues what was interrupted and repeats nothing."""
    given = {"method": method, "target": target, "seed": seed, "layers": None if layers is None else parse_layers(layers)}
    execution = {"device": device, "threads": threads, "wandb": wandb}
    configs = run_configs(_present(given), _present(execution), preset, config, set_ or [])
    runs = execute_here(configs, existing, "train" if no_eval else "all")
    _report(runs)


def run_configs(given: dict, execution: dict, preset: str | None, file: Path | None, sets: list[str]) -> list[RunConfig]:
    """Configs from a file, a method's preset, options and --set, each over those before it."""
    from decomp_bench.config import RunConfig, merge, parse, parse_set, read_yaml
    from decomp_bench.registry import method, suggest

    base = read_yaml(file) if file is not None else {}
    if "method" not in {**base, **given}:
        raise UserError("name a method (decomp-bench list methods shows them), or give --config with one")
    if file is not None and base.get("method", given.get("method")) != given.get("method", base.get("method")):
        raise UserError(f"{file} is a config of {base['method']}, not of {given['method']}; leave the method out or take another file")
    name = {**base, **given}["method"]
    presets = getattr(method(str(name)), "presets", {})
    if preset is not None and preset not in presets:
        raise UserError(f"{name} has no preset '{preset}'; {suggest(preset, sorted(presets)) if presets else 'it has none'}")
    chosen = {"method_config": presets[preset]} if preset else {}
    options = {**given, **({"train": execution} if execution else {})}
    for item in sets:
        first = item.split("=")[0].split(".")[0]
        if first not in (*RunConfig.model_fields, "method"):
            raise UserError(
                f"--set {item}: no section '{first}'; a method's own key is written method.{first}, others data.*, eval.*, train.*"
            )
    where = str(file) if file is not None else "the options"
    return [parse(RunConfig, merge(merge(merge(base, chosen), options), point), where) for point in parse_set(sets)]


def parse_layers(text: str) -> Any:
    """all, or a tuple of layers."""
    if text == "all":
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--layers takes all or numbers such as 0,2; got '{text}'") from None


def check_existing(text: str) -> Existing:
    """One of the known ways to treat runs that exist."""
    from decomp_bench.runs import EXISTING

    if text not in EXISTING:
        raise UserError(f"--existing takes {', '.join(EXISTING)}; got '{text}'")
    return text


def execute_here(configs: list[RunConfig], existing: str, mode: str) -> list[Run]:
    """Execute runs in this process with a progress line."""
    from decomp_bench.cli.display import Line
    from decomp_bench.launch import execute
    from decomp_bench.runs import runs_folder

    checked = check_existing(existing)
    before = {path.name for path in runs_folder().iterdir()} if runs_folder().is_dir() else set()
    with Line() as line:
        runs = execute(configs, checked, "", line, mode)  # type: ignore[arg-type]
    for run in runs:
        print(f"{run.id}: {run.status}{' (it was there already)' if run.id in before and run.status == 'done' else ''}  {run.path}")
    return runs


def _report(runs: list[Run]) -> None:
    """The table of what was measured, what failed, and what to do next."""
    import pandas as pd

    from decomp_bench.cli.display import summary

    failed = [run for run in runs if run.status == "failed"]
    frames = [run.results() for run in runs if run.evaluated and run.status == "done"]
    if frames:
        summary(pd.concat(frames, ignore_index=True))
    if failed:
        reasons = "; ".join(f"{run.id}: {run.manifest.get('error')} (log: {run.path / 'log.txt'})" for run in failed)
        raise RunFailed(f"{len(failed)} of {len(runs)} runs: {reasons}")
    if runs:
        done = len(runs) > 1 and frames
        following = f"compare {runs[0].id} {runs[1].id}" if done else f"show {runs[0].id}" if frames else f"eval {runs[0].id}"
        print(f"next: decomp-bench {following}")


def _present(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def evaluate(
    run: Annotated[list[str], typer.Argument(help="Ids, or their beginnings.")],
    set_: Sets = None,
) -> None:
    """Score trained runs again; under another eval.* setting, as a run of its own with the same weights."""
    from decomp_bench.config import RunConfig, merge, parse, parse_set
    from decomp_bench.runs import find

    found = [find(prefix) for prefix in run]
    for one in found:
        if not one.trained:
            raise UserError(f"run {one.id} is not trained ({one.status}); continue it: {one.resume_command}")
    for item in set_ or []:
        if not item.startswith("eval."):
            raise UserError(f"--set {item}: eval takes eval.* keys only; anything else needs another training")
    points = parse_set(set_ or [])
    configs = [parse(RunConfig, merge(one.config.model_dump(mode="json"), point), one.id) for one in found for point in points]
    _report(execute_here(configs, "resume", "evaluate"))


def compare(
    first: Annotated[str, typer.Argument(help="A run, or runs that differ in their seeds: RUN,RUN,RUN.")],
    second: Annotated[str, typer.Argument(help="Another, or others, on the same target and tokens.")],
    bootstrap: Annotated[int, typer.Option(help="Resamples of documents, and of seeds where there are several.")] = 2000,
    as_json: Json = False,
) -> None:
    """Differences between two runs, document by document, with paired intervals and p values."""
    from decomp_bench.cli.display import show
    from decomp_bench.comparison import compare as paired
    from decomp_bench.runs import find

    sides = [[find(name) for name in given.split(",")] for given in (first, second)]
    for side in sides:
        if len({(run.config.method, str(run.config.method_config), run.config.layers) for run in side}) > 1:
            raise UserError(f"{', '.join(run.id for run in side)} differ in more than their seed; give one run, or the seeds of one config")
        if len({run.id for run in side}) < len(side):
            raise UserError(f"{', '.join(run.id for run in side)}: give each run once")
    one, other = ([run.documents() for run in side] for side in sides)
    rows = paired(one, other, bootstrap)
    if not as_json:
        print(f"{', '.join(run.id for run in sides[1])} minus {', '.join(run.id for run in sides[0])}")
    show(json.loads(rows.to_json(orient="records")), as_json)


def align(
    first: Annotated[str, typer.Argument(help="A run.")],
    second: Annotated[str, typer.Argument(help="Another of the same target, with components at the same places.")],
    tokens: Annotated[int, typer.Option(help="Held-out tokens, of the first run's data, that activity is compared on.", min=1)] = 20_000,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this .parquet or .csv file.")] = None,
    as_json: Json = False,
) -> None:
    """Whether two runs found the same components, by their vectors and by their activity, and compute the same."""
    from decomp_bench.api import align_runs
    from decomp_bench.cli.display import Line, show
    from decomp_bench.results import write

    if out is not None and out.suffix not in (".parquet", ".csv"):
        raise UserError(f"--out takes a .parquet or .csv file; got '{out}'")
    with Line() as line:
        frame = align_runs(first, second, tokens=tokens, progress=line)
    if out is not None:
        write(frame, out)
    if as_json:
        show(json.loads(frame.to_json(orient="records")), True)
        return
    show(_aligned(frame), False)
    print("alike: 1 is the same, (in brackets) what chance gives; matched: one to one; shared: at least 0.7 alike with the partner")
    outputs = frame[frame["aspect"] == "output"].to_dict("records")
    print("; ".join(f"{row['measure'].replace('_', ' ')} {row['value']:.4g}" for row in outputs))


def _aligned(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each site and aspect."""
    rows = []
    heads = {"one_to_one": "matched", "nearest_first": "nearest of first", "nearest_second": "nearest of second", "shared": "shared"}
    for (site, aspect), group in frame[frame["aspect"] != "output"].groupby(["site", "aspect"], sort=False):
        found = group.to_dict("records")
        cells = {row["measure"]: f"{row['value']:.3f} ({row['null']:.3f})" for row in found}
        alive = f"{found[0]['n_first']:.0f}, {found[0]['n_second']:.0f}"
        rows.append({"site": site, "alive": alive, "aspect": aspect, **{head: cells[key] for key, head in heads.items()}})
    return rows


def audit(
    what: Annotated[str, typer.Argument(help="A run with results, or a figure of an experiment.", metavar="{run|figure}")],
    tolerance: Annotated[float, typer.Option(help="Largest relative difference that passes.")] = 1e-4,
    as_json: Json = False,
) -> None:
    """Compute a stored point again from its checkpoint, and compare. Of a figure, a point whose checkpoint is here."""
    from decomp_bench.cli.display import Line, show
    from decomp_bench.runs import find

    found, stored = behind_figure(Path(what)) if Path(what).suffix in FIGURES else ((run := find(what)), run.results())
    with Line() as line:
        rows = recomputed(found, stored, line)
    worst = max((row["difference"] for row in rows), default=float("inf"))
    show(rows, as_json, "no row to compare")
    if worst > tolerance:
        raise RunFailed(f"{found.id}: stored and computed values differ by up to {worst:.3g} (relative), more than {tolerance:g}")
    if not as_json:
        print(f"{found.id}: {len(rows)} values agree to {worst:.2g}")


FIGURES = (".png", ".svg", ".pdf")


def behind_figure(figure: Path) -> tuple[Run, pd.DataFrame]:
    """A run that a figure shows and whose folder is here, with its rows of the results that the figure was drawn from."""
    from decomp_bench import results
    from decomp_bench.runs import Run, runs_folder

    file = figure.resolve().parent.parent / "results.parquet"
    if not figure.is_file() or not file.is_file():
        raise UserError(f"{figure} is no figure beside results: give results/NNN_name/TARGET/figures/NAME.png, or a run")
    data = results.read(file)
    for name in data["run_id"].drop_duplicates():
        run = Run(runs_folder() / name)
        if (run.path / "checkpoint").is_dir():
            return run, data[data["run_id"] == name]
    raise UserError(f"no run of {file} has its checkpoint in {runs_folder()}: run the experiment here, or set DECOMP_BENCH_RUNS")


def recomputed(run: Run, stored: pd.DataFrame, line: Any) -> list[dict[str, Any]]:
    """Stored and fresh values of the run's own point under the first of its protocols and gate sources."""
    from decomp_bench import data, results, targets
    from decomp_bench.evaluate import evaluate as measure

    config = run.config
    narrow = {"protocols": config.eval.protocols[:1], "gates": config.eval.gates[:1], "sweep": False}
    target = targets.load(config.target)
    line({"phase": "evaluate"})
    source = data.source(target, config.data)
    smaller = config.eval.model_copy(update=narrow)
    found = measure([run.load(target)], source, smaller, [None], lambda event: line({"phase": "evaluate", **event}))
    fresh = results.frame(found[0].rows)
    keys = ["protocol", "gates", "mask", "delta", "curve", "variant", "layer", "site", "base", "metric"]
    both = fresh.merge(stored, on=keys, suffixes=("_now", "_stored")).dropna(subset=["value_now", "value_stored"])
    rows = both[(both["layer"] == "all") & (both["site"] == "all")]
    if set(rows["token_hash_now"]) != set(rows["token_hash_stored"]):
        raise UserError(f"{run.id} was scored on other tokens than those here; the corpus or its packages have changed since")
    shown = rows[["metric", "base", "protocol", "gates"]].assign(stored=rows["value_stored"], now=rows["value_now"])
    shown["difference"] = (shown["now"] - shown["stored"]).abs() / shown["stored"].abs().clip(lower=1e-6)
    return json.loads(shown.to_json(orient="records"))
