"""Language models behind TransformerLens' TransformerBridge: the hub's models by its names, with its hooks, and the weights of `hf:`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decomp_bench.errors import UserError
from decomp_bench.targets.architectures import Layout
from decomp_bench.targets.arrange import transpose_conv1d
from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.huggingface import LONGEST_CONTEXT, fetch, fuse_gelu

# canonical name -> path inside a bridged block; the bridge has split fused matrices itself
_MAPS = {
    "mlp.gate": "mlp.gate",
    "mlp.up": "mlp.in",
    "mlp.down": "mlp.out",
    **{f"attn.{name}": f"attn.{name}" for name in ("q", "k", "v", "o")},
}
_NO_LAYOUT = Layout(block="{}", mlp="mlp")


def load_transformerlens(name: str, uri: str, device: str | torch.device) -> TargetModel:
    """Load a folder, a hub name or a name of TransformerLens and bridge it.

    The weights are hashed before they are bridged, so that the identity is that of `hf:` on the same model, whose numbers it gives to
    rounding; they are held in fp32. `bridge` of the target is the TransformerBridge. Raises UserError as `hf:` does, and where there is
    no bridge for the model.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.supported_models import MODEL_ALIASES

    folder = Path(os.path.expandvars(name)).expanduser()
    official = name if folder.is_dir() else next((hub for hub, aliases in MODEL_ALIASES.items() if name in aliases), name)
    found = fetch(official, layout=_NO_LAYOUT)
    model: Any = found.model
    fuse_gelu(model)
    parameters = sum(p.numel() for p in model.parameters())
    try:
        where = str(folder) if folder.is_dir() else official
        bridge: Any = TransformerBridge.boot_transformers(where, hf_model=model, tokenizer=found.tokenizer, device=str(device))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"TransformerLens cannot bridge '{name}' ({first}); load it as hf:{name}") from None
    transpose_conv1d(model)
    config = model.config
    context = min(LONGEST_CONTEXT, getattr(config, "max_position_embeddings", LONGEST_CONTEXT))
    about = {"model_type": config.model_type, "parameters": parameters}
    target = TargetModel(
        uri, model, _architecture(bridge, model, name), len(bridge.blocks), config.hidden_size, "lm", found.tokenizer, context, device,
        about, found.identity,
    )  # fmt: skip
    target.bridge = bridge
    return target


def _architecture(bridge: Any, model: Any, name: str) -> Architecture:
    """Where the bridged parts lie inside the bridged model, whose forward runs them."""
    paths = {id(module): path for path, module in model.named_modules()}

    def path(part: nn.Module | None) -> str | None:
        found = paths.get(id(part))
        return None if found is None else found.replace(f"{block}.0", f"{block}.{{}}", 1)

    first = bridge.blocks[0]
    block = paths[id(first)].removesuffix(".0")
    mlp = _inside(first, "mlp")
    if mlp is None or getattr(mlp, "name", None) is None:
        raise UserError(f"{name}: its bridge has no MLP module in its blocks; load it as hf:{name}")
    maps = {point: path(_inside(first, inner)) for point, inner in _MAPS.items()}
    attn = path(_inside(first, "attn"))
    body = getattr(model, "base_model_prefix", "") or None
    return Architecture(f"{block}.{{}}", str(path(mlp)), attn, {k: v for k, v in maps.items() if v is not None}, body)


def _inside(block: nn.Module, path: str) -> nn.Module | None:
    """A part of a bridged block; `in` and such names are no attributes."""
    part: nn.Module | None = block
    for name in path.split("."):
        part = part._modules.get(name) if part is not None else None
    return part
