"""A run of this suite as a Hugging Face repository: its checkpoint, config and results, and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.errors import UserError
from decomp_bench.files import write_text
from decomp_bench.runs import Run

if TYPE_CHECKING:
    from decomp_bench.decomposer import Decomposer
    from decomp_bench.targets import TargetModel

FILES = ("config.yaml", "manifest.json", "results.parquet", "checkpoint/decomposer.json", "checkpoint/decomposer.safetensors")
SHOWN = {
    "ce_delta": "increase of cross-entropy (nats)",
    "kl": "KL from the clean model",
    "fvu": "variance unexplained",
    "l0_mlp": "active a MLP",
}

CARD = """\
---
library_name: decomp-bench
tags:
- interpretability
- {method}
{base}---
# {run}

A sparse decomposition of the MLPs of `{target}` (weights {identity}), layers {layers}: {summary}.
{paper}

## Use

    decomp-bench import NAME --from hub --target {target}
    decomp-bench eval RUN

## Measured

{table}

## Config

{config}
"""


def read_run(given: str, target: TargetModel) -> tuple[Decomposer, dict[str, str]]:
    """The decomposition of a folder or repository, and the hashes of its files; raises UserError where it was made for another target."""
    from decomp_bench.decomposer import Decomposer
    from decomp_bench.interop._files import Source

    source = Source(given, "checkpoint/decomposer.json and decomposer.safetensors")
    for name in FILES[3:]:
        source.json(name) if name.endswith(".json") else source.tensors(name)
    return Decomposer.load(source.path / "checkpoint", target), source.used


def write_run(run: Run, folder: Path) -> list[Path]:
    """The repository's files; raises UserError for a run without a checkpoint."""
    if not run.trained:
        raise UserError(f"run {run.id} has no checkpoint ({run.status}); continue it: {run.resume_command}")
    card = _card(run)
    written = [name for name in FILES if (run.path / name).is_file()]
    for name in written:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.path / name, folder / name)
    write_text(card, folder / "README.md")
    return [folder / name for name in (*written, "README.md")]


def upload(folder: Path, name: str) -> str:
    """Push a written folder to the repository ORG/NAME, which is made where it is not there; returns its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot upload to {name} ({type(error).__name__}: {reason}); the files are in {folder}: hf upload {name} {folder}"
        ) from None
    return f"https://huggingface.co/{name}"


def _card(run: Run) -> str:
    from decomp_bench.registry import method

    config, manifest = run.config, run.manifest
    kind = method(config.method)
    scheme, _, rest = config.target.partition(":")
    published = scheme == "hf" and not Path(rest).is_absolute()
    return CARD.format(
        method=config.method,
        base=f"base_model: {rest}\n" if published else "",
        run=run.id,
        target=config.target if scheme != "hf" or published else "hf:FOLDER",
        identity=manifest.get("target_hash"),
        layers=", ".join(map(str, config.layers)),
        summary=kind.summary,
        paper=f"Method: {kind.paper}." if kind.paper else "",
        table=_table(run) if run.evaluated else "Nothing yet.",
        config="\n".join(f"    {key}: {value}" for key, value in config.method_config.items()),
    )


def _table(run: Run) -> str:
    """The trained condition under every protocol, gates from the clean pass."""
    frame: Any = run.results()
    own = frame[(frame["curve"] == "trained") & (frame["layer"] == "all") & (frame["site"] == "all") & (frame["gates"] == "clean")]
    own = own[(own["mask"] != "all") & (own["delta"] != "on")]
    lines = ["| protocol | " + " | ".join(SHOWN.values()) + " |", "|---" * (1 + len(SHOWN)) + "|"]
    for protocol, rows in own.groupby("protocol"):
        values = {row["metric"]: row["value"] for _, row in rows.iterrows()}
        lines.append(f"| {protocol} | " + " | ".join(f"{values[key]:.4g}" if key in values else "-" for key in SHOWN) + " |")
    return "\n".join([*lines, "", f"{int(own['n'].max()):,} tokens of {own['dataset'].iloc[0]}."])
