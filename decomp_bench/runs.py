"""Run folders: what identifies a run, where it lies, what state it is in. Imports no torch until a run is resolved or loaded."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from filelock import FileLock, Timeout
from pydantic_core import to_jsonable_python

from decomp_bench.config import DataConfig, MethodConfig, RunConfig, digest, parse, read_yaml
from decomp_bench.errors import UserError
from decomp_bench.files import write_json

if TYPE_CHECKING:
    import pandas as pd

    from decomp_bench.decomposer import Decomposer
    from decomp_bench.targets import TargetModel

MANIFEST_VERSION = 1
FOLDER_VARIABLE = "DECOMP_BENCH_RUNS"
Existing = Literal["resume", "skip", "overwrite", "error"]
EXISTING: tuple[Existing, ...] = ("resume", "skip", "overwrite", "error")
EXECUTION_ONLY = {"train": ("device", "log_every", "save_every", "wandb", "compile"), "eval": ("batch",)}
"""Config keys that change nothing about a run's result and stay out of its id."""
ADDED_LATER = {
    "data": ("packing", "documents", "lower", "subset", "split", "validation_split", "test_split", "streaming", "tokenised", "activations"),
}
"""Config keys that are younger than the first runs: at their defaults they stay out of the id, so that it is what it was."""
ARTIFACTS = ("config.yaml", "checkpoint", "checkpoint_two_thirds", "results.parquet", "documents.parquet")


def runs_folder() -> Path:
    """Where run folders lie: $DECOMP_BENCH_RUNS, or results/runs of the working folder."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "results/runs").expanduser()


@contextlib.contextmanager
def folder_at(path: Path) -> Iterator[None]:
    """Keep runs under a path while the context lasts, unless the variable already says where; children inherit it."""
    if os.environ.get(FOLDER_VARIABLE):
        yield
        return
    os.environ[FOLDER_VARIABLE] = str(path)
    try:
        yield
    finally:
        del os.environ[FOLDER_VARIABLE]


def target_slug(uri: str) -> str:
    """A target's URI as part of a file name: `pydocs-4l`, `toy-resid_mlp1-7`, and the last folder of a path."""
    scheme, _, rest = uri.rpartition(":")
    name = rest.rstrip("/").rsplit("/", 1)[-1] if scheme != "toy" else f"toy-{rest}"
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "target"


@dataclass(frozen=True)
class ResolvedRun:
    """A config whose every default is filled in, and the id that follows from it."""

    config: RunConfig
    method: type[Decomposer]
    method_config: MethodConfig
    layers: tuple[int, ...]
    id: str
    training_key: str
    """Hash of what the weights depend on; runs that differ in their evaluation only share it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the id was computed from, beside the config: versions and hashes, for the manifest."""


def resolve(config: RunConfig, target: TargetModel, source: Any, where: str = "config") -> ResolvedRun:
    """Validate a run against its method and target and name it; raises UserError for whatever does not fit.

    The id leaves out where things lie (the target's and the data's path): their hashes stand for them.
    """
    from decomp_bench.metrics import metric_versions
    from decomp_bench.registry import method

    kind = method(config.method)
    method_config = parse(kind.Config, config.method_config, f"{where}, config of {config.method}")
    layers = target.layer_tuple(config.layers)
    reason = kind.skip(target, layers)
    if reason:
        raise UserError(f"{config.method} does not apply to {target.uri}: {reason}")
    full = config.model_copy(update={"layers": layers, "method_config": method_config.model_dump(mode="json")})
    facts = {
        "method_version": kind.version,
        "metric_versions": metric_versions(),
        "corpus": source.name,
        "corpus_hash": source.hash,
        "target_hash": target.identity,
    }
    hashed = _hashed(full, kind.Config)
    training = {key: value for key, value in hashed.items() if key != "eval"}
    training_facts = {key: value for key, value in facts.items() if key != "metric_versions"}
    chosen = "all" if layers == target.layer_tuple("all") else "_".join(map(str, layers))
    name = f"{config.method}-{target_slug(config.target)}-{chosen}-s{config.seed}-{digest([hashed, facts])}"
    return ResolvedRun(full, kind, method_config, layers, name, digest([training, training_facts], 16), facts)


def _hashed(config: RunConfig, own: type[MethodConfig]) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    for key in own.younger:
        if data["method_config"][key] == to_jsonable_python(own.model_fields[key].default):
            del data["method_config"][key]
    del data["target"], data["data"]["source"]
    if config.imported is None:  # ids of trained runs are those from before there were imports
        del data["imported"]
    for section, keys in EXECUTION_ONLY.items():
        for key in keys:
            del data[section][key]
    for section, keys in ADDED_LATER.items():
        defaults = type(getattr(config, section))().model_dump(mode="json")
        for key in keys:
            if data[section][key] == defaults[key]:
                del data[section][key]
    return data


class Run:
    """One run folder."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.id = self.path.name

    def __repr__(self) -> str:
        return f"Run({self.id}, {self.status})"

    # ---- reading

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands; raises UserError where it is missing or broken."""
        try:
            return json.loads((self.path / "manifest.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"{self.path} has no readable manifest.json; delete it: decomp-bench runs rm {self.id}") from None

    @property
    def status(self) -> str:
        """created, training, evaluating, done, failed or interrupted; a run that nobody is working on any more reads as interrupted."""
        try:
            status = self.manifest.get("status", "interrupted")
        except UserError:
            return "interrupted"
        return "interrupted" if status in ("created", "training", "evaluating") and self.free() else status

    @property
    def config(self) -> RunConfig:
        """The resolved config."""
        return parse(RunConfig, read_yaml(self.path / "config.yaml"), str(self.path / "config.yaml"))

    @property
    def checkpoint(self) -> Path:
        """Folder of the final weights."""
        return self.path / "checkpoint"

    @property
    def trained(self) -> bool:
        """Whether the final weights are there."""
        return (self.checkpoint / "decomposer.json").is_file()

    @property
    def parameters(self) -> int | None:
        """Scalars that the final weights hold, by the file's head; None where there is none that can be read."""
        try:
            with (self.checkpoint / "decomposer.safetensors").open("rb") as stream:
                head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        except (OSError, ValueError, MemoryError):
            return None
        return sum(math.prod(about["shape"]) for name, about in head.items() if name != "__metadata__")

    @property
    def evaluated(self) -> bool:
        """Whether results are there."""
        return (self.path / "results.parquet").is_file()

    def decomposer(self, device: str = "cpu") -> Decomposer:
        """The trained decomposition on its target; raises UserError where there are no weights yet."""
        from decomp_bench import targets
        from decomp_bench.decomposer import Decomposer

        return Decomposer.load(self.checkpoint, targets.load(self.config.target, device))

    def results(self) -> pd.DataFrame:
        """The run's rows; raises UserError where it has none."""
        from decomp_bench import results

        if not self.evaluated:
            raise UserError(f"run {self.id} has no results ({self.status}); make them: decomp-bench eval {self.id}")
        try:
            return results.read(self.path / "results.parquet")
        except ValueError as error:
            raise UserError(str(error)) from None

    def documents(self) -> pd.DataFrame:
        """Per-document sums and counts; raises UserError where there are none."""
        import pandas as pd

        path = self.path / "documents.parquet"
        if not path.is_file():
            raise UserError(f"run {self.id} has no per-document results; make them: decomp-bench eval {self.id}")
        return pd.read_parquet(path)

    def load(self, target: TargetModel | None = None, folder: str = "checkpoint") -> Decomposer:
        """The trained decomposer, bound to its target (loaded unless given)."""
        from decomp_bench.decomposer import Decomposer
        from decomp_bench.targets import load

        if not self.trained:
            raise UserError(f"run {self.id} has no checkpoint ({self.status}); continue it: {self.resume_command}")
        return Decomposer.load(self.path / folder, target or load(self.config.target))

    @property
    def resume_command(self) -> str:
        """What continues the run."""
        return f"decomp-bench train --config {self.path / 'config.yaml'}"

    # ---- writing

    def update(self, **changes: Any) -> None:
        """Change entries of the manifest, atomically."""
        known = json.loads((self.path / "manifest.json").read_text()) if (self.path / "manifest.json").exists() else {}
        write_json({**known, **changes, "updated": now()}, self.path / "manifest.json")

    def log(self, text: str) -> None:
        """Add a line to log.txt."""
        with (self.path / "log.txt").open("a") as stream:
            stream.write(f"{now()} {text}\n")

    def lock(self) -> FileLock:
        """The lock that whoever works on the run holds. It lies beside the folder, which may be deleted under it."""
        folder = self.path.parent / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{self.id}.lock", is_singleton=False)

    def free(self) -> bool:
        """Whether nobody works on the run."""
        if not (self.path.parent / ".locks" / f"{self.id}.lock").exists():
            return True
        lock = self.lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        lock.release()
        return True

    def remove(self) -> None:
        """Delete the folder; raises UserError while somebody works on the run."""
        lock = self.lock()
        try:
            lock.acquire(timeout=1)
        except Timeout:
            raise UserError(f"run {self.id} is being worked on by another process; stop that one first") from None
        try:
            shutil.rmtree(self.path)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def create(resolved: ResolvedRun) -> Run:
    """Make a run's folder with config and manifest. It appears whole or not at all."""
    from decomp_bench.provenance import made_by

    final = runs_folder() / resolved.id
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        given = resolved.config
        config = given.model_copy(update={"data": _absolute(given.data), "target": _absolute_uri(given.target)})
        (temporary / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        manifest = {"schema_version": MANIFEST_VERSION, "id": resolved.id, "status": "created", "created": now()}
        manifest |= {"training_key": resolved.training_key, **resolved.facts, **made_by(), "error": None, "cost": {}, "artifacts": {}}
        write_json(manifest, temporary / "manifest.json")
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Run(final)


def _absolute(data: DataConfig) -> DataConfig:
    from decomp_bench.data.local import absolute

    return data if data.source is None else data.model_copy(update={"source": absolute(data.source)})


def _absolute_uri(uri: str) -> str:
    scheme, sign, rest = uri.partition(":")
    return f"{scheme}:{Path(rest).expanduser().resolve()}" if sign and scheme != "toy" and Path(rest).expanduser().is_dir() else uri


def all_runs() -> list[Run]:
    """Every run folder, newest last."""
    folder = runs_folder()
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []  # hidden: half made
    found = [path for path in entries if (path / "manifest.json").is_file()]
    return [Run(path) for path in sorted(found, key=lambda path: ((path / "config.yaml").stat().st_mtime, path.name))]


def find(prefix: str) -> Run:
    """The run whose id starts with a prefix, the one in a folder, or the published one of `wandb:entity/project/run`, which is fetched.

    Raises UserError where there is none or more than one.
    """
    if prefix.startswith("wandb:"):
        return fetch(prefix)
    if (Path(prefix) / "manifest.json").is_file():
        return Run(Path(prefix).resolve())
    runs = all_runs()
    found = [run for run in runs if run.id == prefix] or [run for run in runs if run.id.startswith(prefix)]
    found = found or [run for run in runs if run.id.endswith(f"-{prefix}")]
    if len(found) == 1:
        return found[0]
    if not found:
        hint = f"runs there: {', '.join(run.id for run in runs[-5:])}" if runs else "there are none yet: decomp-bench train METHOD"
        raise UserError(f"no run '{prefix}' in {runs_folder()}; {hint}")
    raise UserError(f"'{prefix}' fits {len(found)} runs, give more of the id: {', '.join(run.id for run in found[:6])}")


def fetch(uri: str) -> Run:
    """The run `wandb:entity/project/run` in the runs folder: the one that is there already, or what was logged of it, checked and whole.

    Raises UserError where it cannot be fetched, or where what was fetched is no run of that name.
    """
    from decomp_bench.remote import wandb_artifact, wandb_name
    from decomp_bench.tracking import ARTIFACT, LOGGED

    final = runs_folder() / wandb_name(uri, "the run")["run"]
    if Run(final).trained:
        return Run(final)
    if final.exists():
        raise UserError(f"{final} is in the way: an unfinished run of the same name; delete it: decomp-bench runs rm {final.name}")
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        wandb_artifact(uri, ARTIFACT, [*LOGGED, "checkpoint/*"], temporary, "the run")
        _check_fetched(Run(temporary), final.name)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Run(final)


def _check_fetched(run: Run, name: str) -> None:
    from decomp_bench.provenance import artifact_hashes

    wrong = f"what was logged as {name} is no run of decomp-bench"
    try:
        manifest, _ = run.manifest, run.config
    except UserError as error:
        raise UserError(f"{wrong}: {str(error).replace(str(run.path), 'it').partition(';')[0]}") from None
    if not isinstance(manifest, dict) or manifest.get("id") != name:
        raise UserError(f"{wrong}: its manifest names another run")
    if not run.trained:
        raise UserError(f"{wrong}: it has no checkpoint")
    kept = {key: value for key, value in manifest.get("artifacts", {}).items() if (run.path / key).is_file()}
    if kept != {key: value for key, value in artifact_hashes(run.path, ARTIFACTS).items() if key in kept}:
        raise UserError(f"{wrong}: its files are not those that its manifest lists; fetch it again or ask who logged it")


def find_trained(training_key: str) -> Run | None:
    """A run with these very weights, whatever it was evaluated with."""
    for run in all_runs():
        if run.trained and run.manifest.get("training_key") == training_key and run.manifest.get("status") != "failed":
            return run
    return None
