"""Runs of parameter decomposition, written as their authors' code saves them."""

from __future__ import annotations

import torch
import yaml
from torch import Tensor


def write(folder, state: dict[str, Tensor], config: dict, step: int = 7):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"model_{step}.pth")
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"steps": 10, "batch_size": 4, "n_mask_samples": 1, "seed": 3, **config}))
    return str(folder)
