"""doctor, cache show|evict, target train|list."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from decomp_bench.cli.training import Json
from decomp_bench.errors import RunFailed, UserError

REPORT_STEPS = 30


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("doctor")(doctor)
    cache = typer.Typer(help="Files that can be computed again: show, evict.", no_args_is_help=True, rich_markup_mode=None)
    cache.command("show")(cache_show)
    cache.command("evict")(cache_evict)
    app.add_typer(cache, name="cache")
    target = typer.Typer(help="Targets: train, list.", no_args_is_help=True, rich_markup_mode=None)
    target.command("train")(target_train)
    target.command("list")(target_list)
    app.add_typer(target, name="target")


# ---- doctor


def doctor(
    report: Annotated[bool, typer.Option("--report", help="Train each method on each toy for a few steps.")] = False, as_json: Json = False
) -> None:
    """What is installed, what this machine offers, and whether targets and data are there."""
    from decomp_bench.cli.display import show

    if report:
        rows = trial_rows()
        show(rows, as_json)
        failed = [row for row in rows if row["result"] == "FAIL"]
        if failed:
            names = ", ".join(f"{row['method']} on {row['toy']}" for row in failed)
            raise RunFailed(f"{len(failed)} of {len(rows)} trials: {names}")
        return
    rows = [_checked(name, check) for name, check in CHECKS.items()]
    show(rows, as_json)
    broken = [row["item"] for row in rows if row["state"] == "BROKEN"]
    if broken:
        raise RunFailed(f"{', '.join(broken)}: set the environment up again with: bash setup_env.sh")
    if not as_json:
        print("next: decomp-bench experiment run 000 --preset smoke")


def _checked(name: str, check: Any) -> dict[str, str]:
    try:
        state, detail = check()
    except Exception as error:  # a check that cannot be made is what doctor is there to show
        state, detail = "BROKEN", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return {"item": name, "state": state, "detail": detail}


def _versions() -> tuple[str, str]:
    from decomp_bench.provenance import missing_packages, packages

    found, missing = packages(), missing_packages()
    python = ".".join(map(str, sys.version_info[:3]))
    shown = ("decomp-bench", "torch", "transformers", "numpy")
    text = f"python {python}, " + ", ".join(f"{name} {found[name]}" for name in shown if name in found)
    return ("BROKEN", f"not installed: {', '.join(missing)}") if missing else ("ok", text)


def _device() -> tuple[str, str]:
    import torch

    from decomp_bench.provenance import cores, hardware, has_nvidia
    from decomp_bench.train import pick_device

    here, device = hardware(), str(pick_device("auto"))
    unused = has_nvidia() and not torch.cuda.is_available()
    note = "; an NVIDIA driver is there but this torch does not use it: run setup_env.sh again" if unused else ""
    text = f"{device}, {here.get('gpu', here['cpu'])}, {cores()} cores, {here['memory_gb']} GB, torch threads {torch.get_num_threads()}"
    return "note" if unused else "ok", text + note


def _target() -> tuple[str, str]:
    from decomp_bench.targets import EMBEDDED, load

    target = load(EMBEDDED)
    size = sum(parameter.numel() for parameter in target.module.parameters())
    return "ok", f"{EMBEDDED}: {target.layers} layers, {size:,} parameters, weights {target.identity}"


def _corpus() -> tuple[str, str]:
    from decomp_bench.config import DataConfig
    from decomp_bench.data import source
    from decomp_bench.targets import EMBEDDED, load

    found = source(load(EMBEDDED), DataConfig())
    return "ok", f"{found.name}, tokens {found.hash}"


def _data() -> tuple[str, str]:
    from decomp_bench.targets import DATA_VARIABLE, data_folder

    folder = data_folder()
    if folder.is_dir():
        return "ok", f"{folder.resolve()}"
    return "absent", f"no {folder}; optional: set {DATA_VARIABLE} to a folder of models and texts"


def _cache() -> tuple[str, str]:
    from decomp_bench.cli.listing import folder_size
    from decomp_bench.data.cache import cache_dir

    return "ok", f"{cache_dir()}, {folder_size(cache_dir()) / 1e6:,.1f} MB"


def _runs() -> tuple[str, str]:
    from decomp_bench.runs import all_runs, runs_folder

    return "ok", f"{runs_folder().resolve()}, {len(all_runs())} runs"


def _methods() -> tuple[str, str]:
    from decomp_bench import registry

    return "ok", ", ".join(registry.method(name).name for name in registry.names())


CHECKS = {
    "versions": _versions,
    "device": _device,
    "methods": _methods,
    "target": _target,
    "corpus": _corpus,
    "data folder": _data,
    "cache": _cache,
    "runs": _runs,
}


def trial_rows() -> list[dict[str, Any]]:
    """Train each method on each toy for a few steps: the loss at the start and the end, and whether it is finite and fell."""
    from decomp_bench import registry
    from decomp_bench.targets.toy import TOYS

    return [trial(name, f"toy:{toy}") for toy in TOYS for name in registry.names()]


def trial(method: str, toy: str) -> dict[str, Any]:
    """One line of the report."""
    import math
    import tempfile

    from decomp_bench import data, registry, targets
    from decomp_bench.config import DataConfig, TrainConfig, parse
    from decomp_bench.train import Job, train

    row: dict[str, Any] = {"method": method, "toy": toy, "loss start": None, "loss end": None, "seconds": None}
    row |= {"result": "pass", "note": ""}
    began, losses = time.monotonic(), []
    try:
        kind, target = registry.method(method), targets.load(toy)
        layers = target.layer_tuple("all")
        if reason := kind.skip(target, layers):
            return {**row, "result": "skip", "note": reason}
        config = parse(kind.Config, {"steps": REPORT_STEPS, "warmup": 2} if kind.trainable else {}, method)
        with tempfile.TemporaryDirectory() as folder:
            made = kind(config, target, layers, 0)
            job = Job(made, Path(folder), probe(made, losses))
            outcome = train([job], data.source(target, DataConfig()), TrainConfig(log_every=1))[0]
    except Exception as error:  # the report is where a broken method shows
        return {**row, "result": "FAIL", "note": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    row["seconds"] = round(time.monotonic() - began, 2)
    if losses:
        row |= {"loss start": sum(losses[:3]) / len(losses[:3]), "loss end": sum(losses[-3:]) / len(losses[-3:])}
        fell = math.isfinite(row["loss end"]) and row["loss end"] < row["loss start"]
        note = outcome.error or ("" if fell else "the loss did not fall")
        row |= {"result": "FAIL" if note else "pass", "note": note}
    return row


def probe(decomposer: Any, losses: list[float]) -> Any:
    """A log that measures the loss of the first batch as at the end of training: penalties that are annealed do not move it."""
    import torch

    original, first = decomposer.loss, []

    def loss(batch: Any, progress: float) -> Any:
        if not first:
            first.append(batch)
        return original(batch, progress)

    def log(_line: dict[str, Any]) -> None:
        with torch.no_grad():
            draws = [torch.stack([term.float() for term in original(first[0], 1.0).values()]).sum() for _ in range(3)]
        losses.append(float(torch.stack(draws).mean()))

    decomposer.loss = loss
    return log


# ---- cache


def _entries() -> list[Path]:
    from decomp_bench.data.cache import cache_dir

    return sorted(path for path in cache_dir().rglob("*") if path.is_file())


def cache_show(as_json: Json = False) -> None:
    """What the cache holds, by kind."""
    from decomp_bench.cli.display import show
    from decomp_bench.data.cache import cache_dir

    kinds: dict[str, list[Path]] = {}
    for path in _entries():
        kinds.setdefault(path.relative_to(cache_dir()).parts[0], []).append(path)
    sizes = {kind: sum(path.stat().st_size for path in paths) / 1e6 for kind, paths in kinds.items()}
    rows = [{"kind": kind, "files": len(paths), "mb": round(sizes[kind], 2)} for kind, paths in kinds.items()]
    if not as_json:
        print(f"{cache_dir()}: {sum(row['mb'] for row in rows):,.1f} MB")
    show(rows, as_json, "empty")


def cache_evict(
    days: Annotated[float, typer.Option(help="Only what was not read or written for so many days.")] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete cached files; they are computed again when they are needed."""
    if days < 0:
        raise UserError(f"--days takes 0 or more; got {days:g}")
    limit = time.time() - days * 86400
    old = [path for path in _entries() if max(path.stat().st_atime, path.stat().st_mtime) <= limit]
    size = sum(path.stat().st_size for path in old) / 1e6
    if old and not yes and not typer.confirm(f"delete {len(old)} cached file(s), {size:,.1f} MB?"):
        print("nothing deleted")
        return
    for path in old:
        path.unlink(missing_ok=True)
    print(f"deleted {len(old)} file(s), {size:,.1f} MB")


# ---- targets


def target_train(
    name: Annotated[str, typer.Argument(help="pydocs-4l, a toy such as toy:tms_5-2@3, or a shape of your own: llama-simple-mlp or gpt2.")],
    seed: Annotated[int, typer.Option(help="Training seed; of a toy, write it into the name.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder that the model is written to; default: the name.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for resume states.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as data.source=F or model.width=64. Repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps; pydocs-4l is trained on the CPU.")] = "auto",
) -> None:
    """Train the embedded target again from the documentation that is installed here, a toy, or a target of your own on any data.

    The same command again continues what was interrupted.
    """
    from decomp_bench.registry import suggest
    from decomp_bench.targets.pretraining import SHAPES

    if name.startswith("toy:"):
        if seed or out or work or set_ or device != "auto":
            raise UserError(f"toys are trained on the CPU into the cache folder, by name alone: decomp-bench target train {name}")
        return _train_toy(name)
    if name not in ("pydocs-4l", *SHAPES):
        raise UserError(f"no recipe for target '{name}'; {suggest(name, ['pydocs-4l', *SHAPES, 'toy:NAME@SEED'])}")
    if name == "pydocs-4l" and set_:
        raise UserError(f"pydocs-4l has a fixed recipe; --set is for {', '.join(SHAPES)}")
    out = Path(name) if out is None else out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give another folder with --out")
    from decomp_bench.cli.display import Line

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with Line() as line:

        def tell(step: int, steps: int, info: dict[str, Any]) -> None:
            line({"phase": info.get("stage", "train"), "step": step, "steps": steps, "loss": info.get("loss")})

        about, following = _trained(name, out, seed, work, set_ or [], device, tell)
    for key, value in about.items():
        if isinstance(value, (str, int, float)):
            print(f"{key}: {value}")
    print(f"next: {following}")


def _train_toy(uri: str) -> None:
    """Train a toy with a known truth and show what its gate found; exit 1 where the gate rejects it."""
    from decomp_bench.cli.display import Line
    from decomp_bench.targets.toy import named
    from decomp_bench.targets.toys.library import RECIPES, TOYS, rejection, train_toy

    name, seed = named(uri.removeprefix("toy:"))
    if name not in RECIPES:
        raise UserError(f"{uri} is trained afresh whenever it is used; kept in the cache are {', '.join(f'toy:{toy}' for toy in RECIPES)}")
    seed = TOYS[name].seeds[0] if seed is None else seed
    with Line() as line:
        folder, manifest = train_toy(name, seed, lambda step, steps: line({"phase": "train", "step": step, "steps": steps}))
    for key, value in {**manifest["figures"], "accepted": manifest["accepted"]}.items():
        print(f"{key}: {value}")
    if not manifest["accepted"]:
        raise RunFailed(rejection(name, manifest))
    print(f"{folder}\nnext: decomp-bench train spd --target {uri}")


def _trained(name: str, out: Path, seed: int, work: Path | None, sets: list[str], device: str, tell: Any) -> tuple[dict[str, Any], str]:
    """A training's record, and the command that decomposes what it made."""
    from decomp_bench.targets import pretraining
    from decomp_bench.targets.pydocs import train_pydocs

    verb = "train transcoder"
    if name == "pydocs-4l":
        return train_pydocs(out, seed, work=work, progress=tell), f"decomp-bench {verb} --target hf:{out}"
    from decomp_bench.config import parse, parse_set
    from decomp_bench.train import pick_device

    points = parse_set(sets)
    if len(points) > 1:
        raise UserError("target train takes one value for each key; train the points of a sweep one after another")
    config = parse(pretraining.PretrainingConfig, points[0], "--set")
    about = pretraining.pretrain(name, config, out, seed, work=work, device=str(pick_device(device)), progress=tell)
    return about, pretraining.use_command(str(out), config, verb)


def target_list(as_json: Json = False) -> None:
    """Every target by name, and the forms of those that you bring."""
    from decomp_bench.cli.listing import targets

    targets(as_json)
