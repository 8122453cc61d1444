"""What a run was made with and what it cost: code, packages, hardware, time, memory. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("decomp-bench", "torch", "transformers", "tokenizers", "transformer-lens", "sae-lens", "datasets", "safetensors", "numpy", "pandas"),
    *("pyarrow", "scikit-learn", "scipy", "matplotlib", "pydantic", "typer"),
)
SOURCES = ("decomp_bench", "methods", "experiments", "pyproject.toml")
"""What a clean commit refers to: code and configs. Results change with every run and do not make a commit dirty."""


def git_state() -> dict[str, Any]:
    """Commit of the project's own sources and whether they differ from it; None and None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    nothing = {"commit": None, "dirty": None}
    if not (root / "pyproject.toml").is_file():
        return nothing
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        dirty = bool(_git(root, "status", "--porcelain", "--", *SOURCES).strip())
    except (OSError, subprocess.SubprocessError):
        return nothing
    return {"commit": commit, "dirty": dirty}


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


def packages() -> dict[str, str]:
    """Versions of the packages that results depend on, those that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def missing_packages() -> list[str]:
    """Declared dependencies that are not installed."""
    missing = []
    for line in requires("decomp-bench") or []:
        name = re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0]
        try:
            if "extra ==" not in line:
                version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_nvidia() -> bool:
    """Whether an NVIDIA driver is loaded, found without importing torch."""
    return Path("/proc/driver/nvidia/version").exists()


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and system."""
    import psutil

    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _relative(argument: str) -> str:
    """An argument with paths as seen from the project: where it lies on a machine is no one's business, and tells nothing."""
    for base in (Path(__file__).resolve().parents[1], Path.cwd()):
        if argument.startswith(f"{base}/"):
            return argument[len(f"{base}/") :]
    return argument


def made_by() -> dict[str, Any]:
    """Everything about the code and the machine that a manifest holds."""
    return {"argv": [_relative(argument) for argument in sys.argv], "git": git_state(), "packages": packages(), "hardware": hardware()}


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def artifact_hashes(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Hashes of the named files, and of every file in the named folders, that exist under a folder."""
    files = [file for name in names for file in ([folder / name] if (folder / name).is_file() else sorted((folder / name).rglob("*")))]
    return {str(file.relative_to(folder)): file_hash(file) for file in files if file.is_file()}
