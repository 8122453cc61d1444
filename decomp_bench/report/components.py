"""A run's components as its page shows them: computed once on held-out text, and kept beside the run in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from decomp_bench.errors import UserError
from decomp_bench.files import write_text
from decomp_bench.provenance import file_hash

if TYPE_CHECKING:
    from decomp_bench.runs import Run

VERSION = 2
FILE = "components.json"


@dataclass(frozen=True)
class Settings:
    """How much is looked at and shown: scored tokens at most, components of all sites together, stretches of text and words of each."""

    tokens: int = 20_000
    shown: int = 256
    contexts: int = 8
    words: int = 8


def stored(run: Run, settings: Settings | None = None) -> dict[str, Any] | None:
    """What was computed of these very weights, under these settings where they are given; None where nothing was."""
    try:
        found = json.loads((run.path / FILE).read_text())
        same = found["version"] == VERSION and found["checkpoint"] == _weights(run)
        return found if same and settings in (None, Settings(**found["settings"])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compute(run: Run, settings: Settings, progress: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Look at a run's components on the split that it was scored on, keep the result beside the run, and return it.

    Raises UserError where the run has no weights, or where its target or data are not here.
    """
    import torch

    from decomp_bench import data, targets
    from decomp_bench.report.survey import survey
    from decomp_bench.report.toy import look

    if not run.trained:
        raise UserError(f"run {run.id} has no checkpoint ({run.status}); continue it: {run.resume_command}")
    config = run.config
    torch.set_num_threads(config.train.threads)
    target = targets.load(config.target)
    source = data.source(target, config.data)
    found = {"version": VERSION, "checkpoint": _weights(run), "settings": asdict(settings)}
    decomposer = run.load(target)
    found |= survey(decomposer, source, config.eval.split, settings, progress) | {"toy": look(decomposer)}
    write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n", run.path / FILE)
    return found


def _weights(run: Run) -> str:
    """Hash of the weights; empty where they are not here, as for a run of which only the results were kept."""
    path = run.checkpoint / "decomposer.safetensors"
    return file_hash(path) if path.is_file() else ""
