"""Experiments that are programs of their own, such as a benchmark: `script` and `settings` in config.yaml instead of `runs`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from decomp_bench.config import merge, parse_set
from decomp_bench.errors import UserError

if TYPE_CHECKING:
    from decomp_bench.experiment import Experiment, Options


def settings(experiment: Experiment, options: Options) -> dict[str, Any]:
    """The settings of the chosen preset, with what the command line changes about them."""
    config, preset = experiment.config, options.preset or experiment.config.preset
    if preset is not None and preset not in config.presets:
        raise UserError(f"{experiment.name} has no preset '{preset}'; it has {', '.join(sorted(config.presets)) or 'none'}")
    points = parse_set(list(options.set))
    if len(points) > 1:
        raise UserError(f"{experiment.name} takes one value for each key of --set")
    chosen = merge(config.settings, config.presets.get(preset, {}).get("settings", {}) if preset else {})
    unknown = [key for key in points[0] if key not in chosen]
    if unknown:
        raise UserError(f"--set {unknown[0]}: {experiment.name} has no such setting; it has {', '.join(sorted(chosen))}")
    return merge(chosen, points[0])


def results_folder(experiment: Experiment, options: Options) -> Path:
    """Where the results of a preset lie."""
    return experiment.root / "results" / experiment.name / (options.preset or experiment.config.preset or "default")


def execute(experiment: Experiment, options: Options) -> Path:
    """Run `main(settings, folder)` of the script; returns the results folder. Options that only runs have are refused."""
    for name in ("only", "seeds", "target", "workers"):
        if getattr(options, name):
            raise UserError(f"{experiment.name} is a program of its own and has no --{name}: use --preset and --set")
    folder = results_folder(experiment, options)
    folder.mkdir(parents=True, exist_ok=True)
    _module(experiment).main(settings(experiment, options), folder)
    return folder


def _module(experiment: Experiment) -> ModuleType:
    assert experiment.config.script is not None
    path = experiment.path / experiment.config.script
    if not path.is_file():
        raise UserError(f"{experiment.name} has no script {path}: correct `script` in its config.yaml")
    package = ModuleType(f"experiment_{experiment.name}")  # so that the script can import what lies beside it
    package.__path__ = [str(experiment.path)]
    for name in [name for name in sys.modules if name.startswith(package.__name__)]:
        del sys.modules[name]
    sys.modules[package.__name__] = package
    importlib.invalidate_caches()
    module = importlib.import_module(f"{package.__name__}.{path.stem}")
    if not hasattr(module, "main"):
        raise UserError(f"{path} has no main(settings, folder)")
    return module
