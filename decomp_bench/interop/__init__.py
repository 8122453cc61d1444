"""Other tools' dictionaries, read into runs and written from them. A format is one file here; importing this imports no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from decomp_bench.errors import UserError


@dataclass(frozen=True)
class Format:
    """A format's file, whether it is read and written, and what it is."""

    module: str
    reads: bool
    writes: bool
    about: str

    def load(self) -> ModuleType:
        """The module: `read(given)` gives plain coders and file hashes, `write(coders, folder, about)` gives the paths written."""
        return importlib.import_module(f"decomp_bench.interop.{self.module}")


FORMATS: dict[str, Format] = {
    "saelens": Format("saelens", True, True, "sae-lens: a folder of cfg.json and sae_weights.safetensors, a folder of such, or RELEASE:ID"),
    "dictionary_learning": Format(
        "dictionary_learning", True, True, "dictionary_learning: a folder of ae.pt and config.json, or of trainer_N"
    ),
    "sparsify": Format("sparsify", True, True, "sparsify: a hookpoint's folder of sae.safetensors and cfg.json, or a run's folder"),
    "circuit-tracer": Format(
        "circuit_tracer", True, True, "circuit-tracer: config.yaml with layer_N, or with W_enc_N and W_dec_N, safetensors"
    ),
    "npz": Format("npz", True, True, "Gemma-Scope-style params.npz; give --reads in or out"),
    "nn_decompositions": Format("nn_decompositions", True, False, "nn_decompositions: a folder of encoder.pt and config.json"),
    "spd": Format("spd", True, False, "SPD (the paper's code and later): a folder of final_config.yaml and model_STEP.pth, or wandb:..."),
    "vpd": Format("spd", True, False, "VPD (param-decomp while it was torch): the same files"),
    "hub": Format("hub", True, True, "a run of this suite as a Hugging Face repository with a model card; every method"),
    "saebench": Format(
        "saebench", False, True, "a run's results as SAEBench core JSON, a file for each layer; every method on a language model"
    ),
}


def format_named(name: str, use: str) -> Format:
    """A format that is read (`use` "import") or written ("export"); raises UserError for one that is not."""
    fitting = [key for key, found in FORMATS.items() if (found.reads if use == "import" else found.writes)]
    if name not in fitting:
        from decomp_bench.registry import suggest

        raise UserError(f"no format '{name}' to {use}; {suggest(name, fitting)}")
    return FORMATS[name]
