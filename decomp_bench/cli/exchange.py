"""import, export, and list formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from decomp_bench.cli.training import Json, Sets
from decomp_bench.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("import")(import_)
    app.command("export")(export)


def formats(as_json: Json = False) -> None:
    """Every format of another tool, and whether it is imported and exported."""
    from decomp_bench.cli.display import show
    from decomp_bench.interop import FORMATS

    said = {True: "yes", False: "no"}
    show([{"format": n, "import": said[f.reads], "export": said[f.writes], "about": f.about} for n, f in FORMATS.items()], as_json)


def import_(
    source: Annotated[list[str], typer.Argument(help="Folders, files or hub names: one with all layers, or one for each layer.")],
    kind: Annotated[str, typer.Option("--from", help="A format of `list formats`.")],
    target: Annotated[str | None, typer.Option(help="The target that it decomposes, of `list targets`.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers in the order of the coders, such as 0,2, where the files do not say.")] = None,
    reads: Annotated[str | None, typer.Option(help="in (transcoders) or out (autoencoders), where the files do not say.")] = None,
    set_: Sets = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
) -> None:
    """Make a run of another tool's checkpoint, to be scored like any other."""
    from decomp_bench.cli.display import Line
    from decomp_bench.interop import format_named
    from decomp_bench.interop.importing import import_run

    format_named(kind, "import")
    if reads not in (None, "in", "out"):
        raise UserError(f"--reads takes in (what an MLP reads) or out (what it writes); got '{reads}'")
    options = _options(target, device, set_ or [])
    with Line() as line:
        run = import_run(source, kind, options, _layers(layers), reads, line)  # type: ignore[arg-type]
    config = run.config
    print(f"{run.id}: {config.method} of layers {', '.join(map(str, config.layers))}  {run.path}")
    print(f"next: decomp-bench {'show' if run.evaluated else 'eval'} {run.id}")


def _options(target: str | None, device: str | None, sets: list[str]) -> Any:
    """Target, data, evaluation and device of the run to be made."""
    from decomp_bench.config import RunConfig, merge, parse, parse_set

    for item in sets:
        if item.split(".")[0] not in ("data", "eval", "train"):
            raise UserError(f"--set {item}: an import takes data.*, eval.* and train.* keys; the rest is in the files")
    points = parse_set(sets)
    if len(points) > 1:
        raise UserError("an import makes one run; give one value to each --set")
    given: dict[str, Any] = {"method": ""} | ({"target": target} if target else {}) | ({"train": {"device": device}} if device else {})
    return parse(RunConfig, merge(given, points[0]), "the options")


def _layers(text: str | None) -> tuple[int, ...] | None:
    from decomp_bench.cli.training import parse_layers

    return None if text is None or text == "all" else parse_layers(text)


def export(
    run: Annotated[str, typer.Argument(help="An id, or its beginning.")],
    to: Annotated[str, typer.Option("--to", help="A format of `list formats`.")],
    out: Annotated[Path | None, typer.Option(help="A new folder; default: exports/RUN-FORMAT.")] = None,
    name: Annotated[str | None, typer.Option(help="With --to hub: the repository to upload to, ORG/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --name: write the folder, upload nothing.")] = False,
) -> None:
    """Write a run in another tool's format, or publish it on the Hugging Face Hub."""
    from decomp_bench.interop import format_named
    from decomp_bench.interop.exporting import export_run
    from decomp_bench.runs import find

    format_named(to, "export")
    if name is not None and (to != "hub" or name.count("/") != 1):
        raise UserError("--name goes with --to hub and takes ORG/NAME")
    found = find(run)
    folder = out or Path("exports") / f"{found.id}-{to}"
    for path in export_run(found, to, folder):
        print(path)
    if name is None:
        return
    if dry_run:
        print(f"not uploaded: hf upload {name} {folder}")
        return
    from decomp_bench.interop.hub import upload

    print(upload(folder, name))
