"""Hugging Face causal language models, from a local folder or the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from decomp_bench.errors import UserError
from decomp_bench.remote import hub_reachable
from decomp_bench.targets.base import Architecture, TargetModel

_ATTENTION = {
    "attn.q": "model.layers.{}.self_attn.q_proj",
    "attn.k": "model.layers.{}.self_attn.k_proj",
    "attn.v": "model.layers.{}.self_attn.v_proj",
    "attn.o": "model.layers.{}.self_attn.o_proj",
}
_PLAIN = {"mlp.up": "model.layers.{}.mlp.up_proj", "mlp.down": "model.layers.{}.mlp.down_proj"}
_PLACES = {"block": "model.layers.{}", "mlp": "model.layers.{}.mlp", "attn": "model.layers.{}.self_attn", "body": "model"}

# model_type of config.json -> where its parts are. A new architecture is a new row.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(maps={"mlp.gate": "model.layers.{}.mlp.gate_proj", **_PLAIN, **_ATTENTION}, **_PLACES),
    "arcee": Architecture(maps={**_PLAIN, **_ATTENTION}, **_PLACES),
}
LONGEST_CONTEXT = 512
"""Rows are no longer than this unless the data config asks: published comparisons use 512."""


def load_huggingface(name: str, uri: str, device: str | torch.device, context: int | None = None) -> TargetModel:
    """Load a folder or hub name in fp32; raises UserError with the fix for a missing, broken or unsupported model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    folder = Path(os.path.expandvars(name)).expanduser()
    local = folder.is_dir()
    offline = local or not hub_reachable()
    where = str(folder) if local else name
    if not local and (name.startswith((".", "/", "~", "$")) or name.count("/") > 1):
        raise UserError(f"no folder {folder}; 'hf:' takes a local model folder or a hub name such as hf:roneneldan/TinyStories-1M")
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=offline)
        architecture = ARCHITECTURES.get(config.model_type)
        if architecture is None:
            raise UserError(f"{name}: architecture '{config.model_type}' is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
        model: Any = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=torch.float32, local_files_only=offline)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=offline)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_reason(name, local, error)) from None
    _fuse_gelu(model)
    longest = context or min(LONGEST_CONTEXT, getattr(config, "max_position_embeddings", LONGEST_CONTEXT))
    about = {"model_type": config.model_type, "parameters": sum(p.numel() for p in model.parameters())}
    return TargetModel(uri, model, architecture, config.num_hidden_layers, config.hidden_size, "lm", tokenizer, longest, device, about)


def _fuse_gelu(model: Any) -> None:
    """The tanh GELU as one operation instead of eight: the same function to rounding, and the largest single cost on a CPU."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def _reason(name: str, local: bool, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if local:
        return f"cannot load the model in {name}: {first}; it needs config.json, model.safetensors and tokenizer files"
    return f"cannot fetch '{name}' from the hub ({type(error).__name__}); without network give a local folder: hf:/path/to/folder"
