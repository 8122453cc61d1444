"""Files of another tool: read one by one, hashed as they are read; whatever is missing or broken is one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decomp_bench.config import read_yaml
from decomp_bench.errors import UserError
from decomp_bench.provenance import file_hash


class Source:
    """A folder (or a single file) of another tool, local or from the Hub (`ORG/NAME` or `ORG/NAME/FOLDER`).

    `used` maps the files that were read to their SHA-256. Raises UserError where there is no such folder.
    """

    def __init__(self, given: str, what: str) -> None:
        self.given, self.used = given, dict[str, str]()
        self.path = _located(given, what)

    def __str__(self) -> str:
        return self.given

    def inside(self, folder: str) -> Source:
        """A folder in this one, whose files count as this one's."""
        inner = object.__new__(Source)
        inner.given, inner.used, inner.path = f"{self.given.rstrip('/')}/{folder}", self.used, self.path / folder
        return inner

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).is_file()

    def folders_with(self, name: str) -> list[str]:
        """Folders below this one that hold a file of this name, by layer number where names differ in one only."""
        found = {str(file.parent.relative_to(self.path)) for file in self.path.rglob(name)}
        return sorted(
            found - {"."}, key=lambda folder: ([int(d) for d in "".join(c if c.isdigit() else " " for c in folder).split()], folder)
        )

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's mapping."""
        found = self._read(name, lambda path: json.loads(path.read_text()))
        if not isinstance(found, dict):
            raise UserError(f"{self}/{name} must hold a mapping of keys to values")
        return found

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML file's mapping."""
        return self._read(name, read_yaml)

    def tensors(self, name: str) -> dict[str, Any]:
        """A safetensors file's tensors, in float32."""
        from safetensors.torch import load_file

        return _float32(self._read(name, load_file))

    def state_dict(self, name: str) -> dict[str, Any]:
        """A state dict saved by torch, in float32; what is not plain tensors is never unpickled."""
        import torch

        found = self._read(name, lambda path: torch.load(path, map_location="cpu", weights_only=True))
        if not isinstance(found, dict):
            raise UserError(f"{self}/{name} is no state dict of tensors")
        return _float32(found)

    def arrays(self, name: str | None = None) -> dict[str, Any]:
        """An .npz file's arrays as float32 tensors; without a name, the source is the file."""
        import numpy as np
        import torch

        def load(path: Path) -> dict[str, Any]:
            with np.load(path, allow_pickle=False) as opened:
                return {key: torch.from_numpy(np.array(opened[key])) for key in opened.files}

        return _float32(self._read(name or "", load))

    def _read(self, name: str, load: Callable[[Path], Any]) -> Any:
        path = self.path / name if name else self.path
        label = f"{self}/{name}" if name else str(self)
        if not path.is_file():
            raise UserError(f"no file {label}; give the folder that holds {name or 'it'}")
        try:
            found = load(path)
        except UserError:
            raise
        except pickle.UnpicklingError:
            raise UserError(f"{label} holds more than tensors and is not unpickled; save its state_dict alone, or as safetensors") from None
        except Exception as error:
            raise UserError(f"{label} is broken ({type(error).__name__}); fetch it again") from None
        self.used[label] = file_hash(path)
        return found


def _located(given: str, what: str) -> Path:
    path = Path(given).expanduser()
    if path.exists():
        return path
    parts = given.split("/")
    if given.startswith((".", "/", "~")) or len(parts) < 2 or not all(parts):
        raise UserError(f"no folder or file {given}; give one that holds {what}, or a hub name such as ORG/NAME")
    from decomp_bench.remote import hub_folder

    name, inner = "/".join(parts[:2]), "/".join(parts[2:])
    folder = hub_folder(name, [inner, f"{inner}/*"] if inner else [], what)
    if not (folder / inner).exists():
        raise UserError(f"the hub repository {name} has no {inner}; look at huggingface.co/{name} for its folders")
    return folder / inner


def _float32(tensors: dict[str, Any]) -> dict[str, Any]:
    """Floating-point tensors as float32, the others as they are."""
    return {key: value.float() if getattr(value, "is_floating_point", lambda: False)() else value for key, value in tensors.items()}


def need(tensors: dict[str, Any], names: tuple[str, ...], where: object) -> None:
    """Raise UserError where a tensor is missing."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(tensors)[:8]) or 'nothing'}")
