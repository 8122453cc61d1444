"""Named tensors in safetensors files that are either whole or absent, and checkpoints of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from decomp_bench.errors import UserError
from decomp_bench.files import atomically


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors; shared storage is copied apart."""
    whole = {key: value.detach().contiguous().clone().cpu() for key, value in tensors.items()}
    atomically(path, lambda temporary: save_file(whole, temporary, metadata=metadata))


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `Decomposer.save` wrote: its description and weights; raises UserError for a missing or broken checkpoint."""
    try:
        about = json.loads((folder / "decomposer.json").read_text())
        missing = {"method", "config", "layers", "seed", "target", "target_hash"} - about.keys()
        if missing:
            raise UserError(f"{folder}/decomposer.json lacks {', '.join(sorted(missing))}; the checkpoint is broken")
        return about, load_file(folder / "decomposer.safetensors")
    except FileNotFoundError:
        raise UserError(f"no checkpoint in {folder}: it needs decomposer.json and decomposer.safetensors") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the checkpoint in {folder} is broken ({type(error).__name__}); train the run again") from None
