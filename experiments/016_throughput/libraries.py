"""The libraries that are compared, and their processes: each trains on the same rows, steps when asked and says what it cost."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pydantic import PositiveInt

from decomp_bench.config import Config
from decomp_bench.errors import RunFailed

WORKERS = Path(__file__).resolve().parent / "workers"
OURS = "decomp_bench"
ARCHITECTURES = {
    OURS: {"batchtopk", "topk", "relu", "jumprelu", "gated", "matryoshka", "groupmax"},
    "sae_lens": {"batchtopk", "topk", "relu", "jumprelu", "gated", "matryoshka"},
    "dictionary_learning": {"batchtopk", "topk", "relu", "jumprelu", "gated", "matryoshka"},
    "sparsify": {"topk", "groupmax"},
}
FILES = {OURS: "ours.py", **{name: f"peer_{name}.py" for name in ARCHITECTURES if name != OURS}}


class Settings(Config):
    width: PositiveInt
    features: PositiveInt
    k: PositiveInt
    batch: PositiveInt
    threads: PositiveInt
    precision: str
    rows: PositiveInt
    warmup: PositiveInt
    steps: PositiveInt
    turns: PositiveInt
    architectures: tuple[str, ...]
    peers: tuple[str, ...]
    quality_steps: int
    quality_lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    cross_layer_features: int = 0


class Worker:
    """A process that trains one library's dictionary when told."""

    def __init__(self, library: str, python: str, job: dict) -> None:
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "job.json").write_text(json.dumps(job))
        threads = str(job["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "WANDB_MODE": "disabled"}
        self.library, self.errors = library, (self.folder / "errors.txt").open("w+")
        command = [python, str(WORKERS / FILES[library]), str(self.folder / "job.json")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment)
        self._answer()

    def ask(self, line: str) -> dict:
        """Send a line and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self.errors.seek(0)
        reason = (self.errors.read().strip().splitlines() or ["it ended without a word"])[-1]
        raise RunFailed(f"the worker of {self.library} stopped: {reason}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.errors.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def job_of(chosen: Settings, architecture: str, activations: Path, total: int, seed: int = 0, lr: float | None = None) -> dict:
    shared = chosen.model_dump(include={"width", "features", "k", "batch", "threads", "precision"})
    held_out = min(8192, chosen.rows // 8)
    own = {"architecture": architecture, "activations": str(activations), "held_out": held_out, "total": total, "seed": seed, "lr": lr}
    return {**shared, **own}
