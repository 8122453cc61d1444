"""A run in another tool's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decomp_bench
from decomp_bench.errors import UserError
from decomp_bench.interop import format_named
from decomp_bench.runs import Run


def export_run(run: Run, kind: str, folder: Path) -> list[Path]:
    """Write a run into a folder in a tool's format; raises UserError, before anything is written, for what the format does not hold."""
    module = format_named(kind, "export").load()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name a new folder with --out")
    if hasattr(module, "write_run"):
        return module.write_run(run, folder)
    from decomp_bench.interop._plain import as_plain

    return module.write(as_plain(run.load()), folder, about(run))


def about(run: Run) -> dict[str, Any]:
    """What files say of where they come from: the run, the model's name and this suite's version."""
    uri = run.config.target
    scheme, _, rest = uri.partition(":")
    return {"run": run.id, "model": rest if scheme == "hf" else uri, "made_by": f"decomp-bench {decomp_bench.__version__}"}
