"""A Python environment for each peer, made on the first use and kept in the cache folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from decomp_bench.data.cache import cache_dir
from decomp_bench.errors import UserError

PACKAGES = {"dictionary_learning": ["dictionary-learning==0.1.0"], "sparsify": ["eai-sparsify==1.3.3"]}
UNWANTED = ["torchvision"]  # a build of it that does not fit the CPU torch keeps transformers from being imported


def python_of(library: str) -> str:
    """The interpreter that has a library: this one, or its own environment's; raises UserError where it cannot be installed."""
    if library not in PACKAGES:
        return sys.executable
    folder = cache_dir() / "environments" / f"{PACKAGES[library][0].replace('==', '-')}-{sys.version_info.major}{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return str(python)
    print(f"installing {PACKAGES[library][0]} into {folder}; this takes a minute or two", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    version = torch.__version__.split("+")[0]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "-q", f"torch=={version}"],
        [str(python), "-m", "pip", "install", "-q", f"torch=={version}", *PACKAGES[library]],
        [str(python), "-m", "pip", "uninstall", "-q", "-y", *UNWANTED],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "uninstall" not in command:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"cannot install {PACKAGES[library][0]}: {reason}; leave it out with --set peers=[sae_lens]")
    Path(folder / "complete").touch()
    return str(python)
