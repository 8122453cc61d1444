"""Frozen models behind one TargetModel, named by URI. Importing this imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from decomp_bench.errors import UserError
from decomp_bench.targets.toys import TOYS

if TYPE_CHECKING:
    from decomp_bench.targets.base import TargetModel

__all__ = ["EMBEDDED", "NAMED", "Named", "TargetModel", "data_folder", "known", "load"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DATA_VARIABLE = "DECOMP_BENCH_DATA"


def __getattr__(name: str):
    if name == "TargetModel":
        from decomp_bench.targets.base import TargetModel

        return TargetModel
    raise AttributeError(name)


def data_folder() -> Path:
    """Folder of data that is not part of the project: DECOMP_BENCH_DATA, else ../shared/data beside the working folder."""
    return Path(os.environ.get(DATA_VARIABLE, "../shared/data")).expanduser()


@dataclass(frozen=True)
class Named:
    """A target with a name of its own: its folder, row length, and the data it goes with (None: the embedded corpus)."""

    about: str
    folder: str
    context: int
    data: str | None = None

    def path(self) -> Path:
        """The model's folder, embedded or under `data_folder()`."""
        return ASSETS / self.folder if self.data is None else data_folder() / self.folder


NAMED = {
    "pydocs-4l": Named("embedded: 4-layer language model of Python documentation, 1M parameters", "pydocs-4l", 256),
    "pydocs-4l@1": Named("embedded: the same model trained from another seed", "pydocs-4l@1", 256),
    "stories260k": Named(
        f"pretrained TinyStories Llama of 5 layers, 260k parameters; needs {DATA_VARIABLE}", "stories260K", 512, "tinystories.jsonl"
    ),
}
EMBEDDED = "pydocs-4l"
SIMPLE = ("llama-simple-mlp", "llama-simple", "gpt2-simple")
"""Schemes of the checkpoints that goodfire-ai/spd, param-decomp and simple_stories_train publish."""
_PATTERNS = [
    {"uri": "hf:FOLDER-or-NAME", "about": "a causal language model, local or from the hub: {families}; give data.source"},
    {"uri": "tl:FOLDER-or-NAME", "about": "the same through TransformerLens' bridge, by TransformerLens' names too; give data.source"},
    {"uri": "llama-simple-mlp:FOLDER-or-wandb:ENTITY/PROJECT/RUN", "about": "a LlamaSimpleMLP checkpoint of Goodfire; give data.source"},
    {"uri": "llama-simple:FOLDER-or-wandb:ENTITY/PROJECT/RUN", "about": "a LlamaSimple checkpoint (gated MLPs); give data.source"},
    {"uri": "gpt2-simple:FOLDER-or-wandb:ENTITY/PROJECT/RUN", "about": "a GPT2Simple checkpoint; give data.source"},
    {"uri": "toy:resid_mlp1@SEED", "about": "a one-layer residual MLP in superposition, trained in seconds"},
    {"uri": "toy:resid_mlp2@SEED", "about": "the same with two layers"},
]


def known() -> list[dict[str, str]]:
    """Every named target and URI pattern: uri, about, and whether it is available here."""
    rows = [
        {"uri": uri, "about": named.about, "available": "yes" if named.path().is_dir() else f"no: {named.path()} is absent"}
        for uri, named in NAMED.items()
    ]
    from decomp_bench.targets.architectures import LAYOUTS

    families = ", ".join(LAYOUTS)
    rows += [{**pattern, "about": pattern["about"].format(families=families), "available": "yes"} for pattern in _PATTERNS]
    toys = [{"uri": f"toy:{name}@SEED", "about": toy.about, "available": f"yes: trained in {toy.cost}"} for name, toy in TOYS.items()]
    return rows + toys


def load(uri: str, device: str = "cpu") -> TargetModel:
    """Load a target by URI onto a device; raises UserError for an unknown URI or an unavailable model."""
    scheme, _, rest = uri.partition(":")
    if uri in NAMED:
        from decomp_bench.targets.huggingface import load_huggingface

        named = NAMED[uri]
        if not named.path().is_dir():
            raise UserError(f"target '{uri}' needs {named.path()}: set {DATA_VARIABLE} to the folder that holds {named.folder}")
        return load_huggingface(str(named.path()), uri, device, named.context)
    if scheme == "hf" and rest:
        from decomp_bench.targets.huggingface import load_huggingface

        return load_huggingface(rest, uri, device)
    if scheme == "tl" and rest:
        from decomp_bench.targets.transformerlens import load_transformerlens

        return load_transformerlens(rest, uri, device)
    if scheme in SIMPLE and rest:
        from decomp_bench.targets.simple import load_simple

        return load_simple(scheme, rest, uri, device)
    if scheme == "toy" and rest:
        from decomp_bench.targets.toy import load_toy

        return load_toy(rest, uri, device)
    from decomp_bench.registry import suggest

    names = [*NAMED, "hf:FOLDER", "tl:FOLDER", *(f"{kind}:FOLDER" for kind in SIMPLE), "toy:resid_mlp1", *(f"toy:{name}" for name in TOYS)]
    raise UserError(f"unknown target '{uri}'; {suggest(uri, names)}")
