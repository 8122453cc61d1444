"""Numbers recorded from the reference implementations, read and compared."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent


class Golden:
    """A recorded case, compared to the tolerances that its README advises."""

    def __init__(self, case: str) -> None:
        self.tensors = load_file(GOLDEN / f"{case}.safetensors")
        self.about = json.loads((GOLDEN / f"{case}.json").read_text())["hyperparameters"]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def agrees(self, key: str, value: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        expected, value = self.tensors[key].double(), value.detach().double()
        if mask is not None:
            expected, value = expected[mask], value[mask]
        gradient = key.startswith("grad")
        scale = max(0.0 if gradient else 0.05, float(expected.abs().max()), 1e-8)
        error = float((value - expected).abs().max()) / scale
        assert error <= (3e-5 if gradient else 1e-5), f"{key}: {error:.1e}"
