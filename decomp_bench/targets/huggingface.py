"""Hugging Face causal language models, from a local folder or the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decomp_bench.config import digest
from decomp_bench.errors import UserError
from decomp_bench.remote import hub_reachable
from decomp_bench.targets.architectures import Layout, layout_of
from decomp_bench.targets.arrange import arrange, blocks, keep_16_bits
from decomp_bench.targets.base import TargetModel, identity_of

LONGEST_CONTEXT = 512
"""Rows are no longer than this unless the data config asks: published comparisons use 512."""


@dataclass
class Loaded:
    """A model as transformers loads it, in fp32, with what else a target needs."""

    model: Any
    tokenizer: Any
    layout: Layout
    identity: str
    """Hash of the weights as published, and of the layout where the folder changes it."""
    stored: torch.dtype | None = None
    """The type that the checkpoint is written in."""


def load_huggingface(name: str, uri: str, device: str | torch.device, context: int | None = None) -> TargetModel:
    """Load a folder or hub name for fp32 evaluation; raises UserError with the fix for a missing, broken or unsupported model."""
    return as_target(fetch(name), name, uri, device, context)


def fetch(name: str, layout: Layout | None = None) -> Loaded:
    """A folder's or hub name's model, with its layout where none is given; raises UserError as `load_huggingface` does."""
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
        stored: Any = config.dtype
        layout, own = (layout, False) if layout else layout_of(config.model_type, name, folder if local else None)
        loading: Any = AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=torch.float32, local_files_only=offline, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=offline)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_reason(name, local, error)) from None
    model, report = loading
    if report["missing_keys"]:
        raise UserError(f"{name} lacks weights of its architecture: {', '.join(sorted(report['missing_keys'])[:3])}; fetch it again")
    identity = identity_of(model)
    return Loaded(model, tokenizer, layout, digest([identity, layout.model_dump()], 16) if own else identity, stored)


def as_target(found: Loaded, name: str, uri: str, device: str | torch.device, context: int | None = None) -> TargetModel:
    """A loaded model as a target; raises UserError where the layout does not fit it."""
    model = found.model
    fuse_gelu(model)
    parameters = sum(p.numel() for p in model.parameters())
    architecture = arrange(model, found.layout, name)
    keep_16_bits(model, architecture, found.stored)
    config = model.config.get_text_config()
    longest = context or min(LONGEST_CONTEXT, getattr(config, "max_position_embeddings", LONGEST_CONTEXT))
    about = {"model_type": model.config.model_type, "parameters": parameters}
    layers = blocks(model, architecture.block)
    width = getattr(config, "hidden_size", None) or model.get_input_embeddings().weight.shape[1]
    return TargetModel(uri, model, architecture, layers, width, "lm", found.tokenizer, longest, device, about, found.identity)


def fuse_gelu(model: Any) -> None:
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
