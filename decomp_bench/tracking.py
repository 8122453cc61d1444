"""Training curves and finished runs: metrics.jsonl always, Weights & Biases where it is asked for. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from decomp_bench.errors import UserError

ARTIFACT = "decomp-bench-run"
"""Type of the artifact that a finished run is logged as."""
LOGGED = ("config.yaml", "manifest.json", "results.parquet", "documents.parquet", "checkpoint")
"""What is in it, as far as the run has it."""
LARGEST_DOCUMENTS = 50 * 2**20
"""Bytes above which the per-document sums stay behind."""


class Tracker:
    """Takes one mapping a log step. Lines of a resumed run that lie at or after its first new step are dropped: they are made again."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any], wandb: str = "off") -> None:
        self.path = folder / "metrics.jsonl"
        self.rewound = False
        self.wandb = None if wandb == "off" else _start_wandb(folder, run_id, config, wandb)

    def __call__(self, metrics: dict[str, Any]) -> None:
        if not self.rewound:
            rewind(self.path, metrics.get("step", 0))
            self.rewound = True
        with self.path.open("a") as stream:
            stream.write(json.dumps(metrics, default=float) + "\n")
        if self.wandb is not None:
            self.wandb.log({key: value for key, value in metrics.items() if key != "step"}, step=metrics.get("step"))

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Finish the Weights & Biases run, if there is one."""
        if self.wandb is not None:
            self.wandb.summary.update(summary or {})
            self.wandb.finish()
            self.wandb = None


def publish(folder: Path, run_id: str, config: dict[str, Any], mode: str) -> None:
    """Log a finished run's files as an artifact of its Weights & Biases run; raises UserError where that fails."""
    session = _start_wandb(folder, run_id, config, mode)
    try:
        import wandb

        artifact = wandb.Artifact(run_id, type=ARTIFACT)
        for name in LOGGED:
            path = folder / name
            if path.is_dir():
                artifact.add_dir(str(path), name=name)
            elif path.is_file() and (name != "documents.parquet" or path.stat().st_size <= LARGEST_DOCUMENTS):
                artifact.add_file(str(path), name=name)
        logged = session.log_artifact(artifact)
        if mode == "online":
            logged.wait()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        again = f"once more: decomp-bench eval {run_id}"
        raise UserError(f"run {run_id} is done, but Weights & Biases did not take it ({reason}); {again}") from None
    finally:
        session.finish()


def rewind(path: Path, step: int) -> None:
    """Drop the lines of a metrics file at or after a step, and a last line that was cut off while it was written."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (read := _parse(line)) is not None and read.get("step", -1) < step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [parsed for line in lines if (parsed := _parse(line)) is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _start_wandb(folder: Path, run_id: str, config: dict[str, Any], mode: str) -> Any:
    try:
        import wandb

        return wandb.init(
            project="decomp-bench",
            id=run_id,
            name=run_id,
            config=config,
            dir=str(folder),
            mode=mode,  # pyright: ignore[reportArgumentType]
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )
    except Exception as error:  # whatever the service, the network or a missing key raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"Weights & Biases did not start ({reason}); log in with `wandb login`, or use --wandb offline or off") from None
