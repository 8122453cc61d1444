"""Where files that can be computed again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: $DECOMP_BENCH_CACHE, or ~/.cache/decomp-bench. Created when absent."""
    named = os.environ.get("DECOMP_BENCH_CACHE")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "decomp-bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
