"""Files that are either whole or absent: text and JSON by atomic rename."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling, then rename it into place; on any failure the old file stays and no scrap is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(data: Any, path: Path) -> None:
    """Write readable JSON."""
    atomically(path, lambda temporary: temporary.write_text(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n"))


def write_text(text: str, path: Path) -> None:
    """Write text."""
    atomically(path, lambda temporary: temporary.write_text(text))


def write_bytes(content: bytes, path: Path) -> None:
    """Write bytes."""
    atomically(path, lambda temporary: temporary.write_bytes(content))
