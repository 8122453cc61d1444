"""Named tensors in safetensors files that are either whole or absent."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from decomp_bench.files import atomically


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors; shared storage is copied apart."""
    whole = {key: value.detach().contiguous().clone().cpu() for key, value in tensors.items()}
    atomically(path, lambda temporary: save_file(whole, temporary, metadata=metadata))
