"""Another tool's files as a run folder, which is scored, shown and compared like a trained one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from decomp_bench.config import RunConfig, digest
from decomp_bench.errors import UserError
from decomp_bench.interop import format_named
from decomp_bench.interop._places import End
from decomp_bench.runs import Run, create, resolve, runs_folder

if TYPE_CHECKING:
    from decomp_bench.data.sources import Source as Data
    from decomp_bench.decomposer import Decomposer
    from decomp_bench.interop._plain import Plain
    from decomp_bench.targets import TargetModel

CALIBRATION_BATCH = 256
SELECTED_BY_K = ("topk", "batchtopk", "groupmax")


def import_run(
    sources: Sequence[str],
    kind: str,
    options: RunConfig,
    layers: tuple[int, ...] | None = None,
    reads: End | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Make a run of other tools' files: one source with all layers, or one for each layer.

    `options` gives target, data and evaluation; `layers` names the layers in the order of the coders where the files do not, `reads`
    what they read. Raises UserError for whatever cannot be represented, before anything is written.
    """
    from decomp_bench import data, targets
    from decomp_bench.train import pick_device

    if progress:
        progress({"phase": "load"})
    target = targets.load(options.target, str(pick_device(options.train.device)))
    text = data.source(target, options.data)
    decomposer, used = _decomposer(sources, kind, target, text, layers, reads)
    imported = digest([kind, sorted(used.values()), decomposer.layers], 16)
    given = {"method": decomposer.name, "layers": decomposer.layers, "seed": decomposer.seed, "imported": imported}
    given["method_config"] = decomposer.config.model_dump(mode="json")
    resolved = resolve(options.model_copy(update=given), target, text, "import")
    run = Run(runs_folder() / resolved.id)
    try:
        with run.lock().acquire(timeout=1):
            if not run.trained:
                shutil.rmtree(run.path, ignore_errors=True)
                create(resolved)
                decomposer.save(run.checkpoint)
                origin = {"from": kind, "sources": [_absolute(source) for source in sources], "files": used}
                run.update(status="done", imported=origin, steps=0, converged="unknown")
                run.log(f"imported from {kind}: {', '.join(sources)}")
    except Timeout:
        raise UserError(f"run {run.id} is being worked on by another process; wait for that one") from None
    return run


def _decomposer(
    sources: Sequence[str], kind: str, target: TargetModel, text: Data, layers: tuple[int, ...] | None, reads: End | None
) -> tuple[Decomposer, dict[str, str]]:
    """The decomposition in the files, and their hashes."""
    module, coders, used = format_named(kind, "import").load(), [], dict[str, str]()
    if hasattr(module, "read_run"):
        chooses = getattr(module, "CHOOSES_LAYERS", False)
        if len(sources) > 1 or reads or (layers and not chooses):
            refused = "--reads" if chooses else "--layers or --reads"
            raise UserError(f"{kind} takes one repository or folder, and no {refused}: it holds a whole run")
        return module.read_run(sources[0], target, *([layers] if chooses else []))
    for source in sources:
        try:
            found, files = module.read(source)
        except UserError as error:
            raise UserError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
        coders, used = [*coders, *found], {**used, **files}
    made = _made(located(coders, layers, reads), target, text)
    made.origin, made.label = kind, _label(sources, coders, used)
    return made, used


def _made(coders: list[Plain], target: TargetModel, text: Data) -> Decomposer:
    """The coders as one decomposition; thresholds that no file holds are calibrated on the target's text."""
    from decomp_bench.data.streams import ActivationStream, iterate
    from decomp_bench.interop._plain import as_decomposer, keep_thresholds, uncalibrated

    made = as_decomposer(coders, target)
    if uncalibrated(coders):
        made.to(target.device).finish(iterate(ActivationStream(text, made.points(), CALIBRATION_BATCH)))
        keep_thresholds(made, coders)
    return made


def located(coders: list[Plain], layers: tuple[int, ...] | None, reads: End | None) -> list[Plain]:
    """The coders with their layers and what they read, from the options where the files do not say."""
    if layers is not None and len(layers) != len(coders):
        raise UserError(f"--layers names {len(layers)} layers and the files hold {len(coders)} coders; name one for each")
    placed = []
    for number, coder in enumerate(coders):
        layer = layers[number] if layers is not None else coder.place.layer
        end = reads or coder.place.end
        if layer is None:
            raise UserError("the files do not say which layers they belong to; name them, such as --layers 0,2")
        if end is None:
            raise UserError("the files do not say what the coders read; give --reads in (a transcoder) or --reads out (an autoencoder)")
        placed.append(replace(coder, place=replace(coder.place, layer=layer, end=end)))
    return placed


def _label(sources: Sequence[str], coders: list[Plain], used: dict[str, str]) -> str:
    """A name for coders whose sparsity follows from a training that is not known here: where they lay, and their hash."""
    if coders[0].activation in SELECTED_BY_K:
        return ""
    name = Path(sources[0]).name or sources[0]
    return f"{name} {digest(sorted(used.values()), 4)}"


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
