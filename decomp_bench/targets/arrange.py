"""Loaded models brought into one shape: every map an nn.Linear of its own, every MLP one module. The function stays the same.

Differences to the model as published are in the last bits of a sum at most: a transposed or split matrix is multiplied in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_bench.errors import UserError
from decomp_bench.targets.architectures import FILE, MAPS, Layout
from decomp_bench.targets.base import Architecture


class Split(nn.Module):
    """A fused linear map as its parts: outputs side by side, or head by head where there are `heads`."""

    def __init__(self, parts: Mapping[str, nn.Linear], heads: int | None) -> None:
        super().__init__()
        self.heads = heads
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        values = [part(x) for part in self.children()]
        if self.heads is None:
            return torch.cat(values, -1)
        return torch.cat([value.unflatten(-1, (self.heads, -1)) for value in values], -1).flatten(-2)


class Joined(nn.Module):
    """An MLP of modules that lie in the block itself. It reads [B, T, d], even where the block hands on [B T, d]."""

    def __init__(self, mlp: nn.Sequential, block: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.sequences = 0
        block.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.sequences = len(args[0] if args else kwargs["hidden_states"])

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) if x.dim() > 2 else self.mlp(x.unflatten(0, (self.sequences, -1))).flatten(0, 1)


class Stored16(nn.Linear):
    """A linear map whose weight stays in the 16 bits that the checkpoint has, and is widened where it is used: the same numbers."""

    def forward(self, input: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        narrow = torch.is_autocast_enabled(input.device.type)
        return F.linear(input, self.weight if narrow else self.weight.to(input.dtype), self.bias)


def linear(weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A linear map of given values; draws no random numbers."""
    made = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return made


def transpose_conv1d(model: nn.Module) -> None:
    """Put nn.Linear in place of transformers' Conv1D, whose weight is [d_in, d_out]."""
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, Conv1D):
                module._modules[name] = linear(child.weight.detach().T.contiguous(), child.bias.detach())


def blocks(model: nn.Module, block: str) -> int:
    """How many blocks a model has under a path with `{}` for the layer."""
    modules = dict(model.named_modules())
    return next(layer for layer in itertools.count() if block.format(layer) not in modules)


def arrange(model: Any, layout: Layout, name: str) -> Architecture:
    """Bring a causal language model into shape and say where its parts are; raises UserError for a path that it lacks."""
    transpose_conv1d(model)
    modules, layers = dict(model.named_modules()), blocks(model, layout.block)
    if not layers:
        raise UserError(f"{name} has no module '{layout.block.format(0)}': correct 'block' in {FILE}; it has {_examples(modules)}")
    maps = {key: path for key, path in layout.maps.items() if path is not None}
    parts = [layout.mlp] if isinstance(layout.mlp, str) else list(layout.mlp)
    for path in [*parts, *([layout.attn] if layout.attn else []), *maps.values()]:
        if not any(f"{layout.block.format(layer)}.{path}" in modules for layer in range(layers)):
            inside = {key.removeprefix(f"{layout.block.format(0)}.") for key in modules if key.startswith(f"{layout.block.format(0)}.")}
            raise UserError(f"{name} has no module '{path}' in its blocks: correct {FILE}; a block has {', '.join(sorted(inside))}")
    found: dict[str, str] = {}
    for key, path in maps.items():
        names = key.split("+")
        for part in names:
            found[part] = f"{path}.{part.split('.')[1]}" if len(names) > 1 else path
        for layer in range(layers if len(names) > 1 else 0):
            _split(modules[layout.block.format(layer)], path, names, layout.interleaved, model.config.get_text_config())
    if len(parts) > 1:
        for layer in range(layers):
            _join(modules[layout.block.format(layer)], parts)
        found = {part: _joined(path, parts) for part, path in found.items()}
    inner = {part: f"{layout.block}.{path}" for part, path in found.items()}
    return Architecture(
        block=layout.block,
        mlp=f"{layout.block}.{parts[0] if len(parts) == 1 else parts[0] + '.mlp'}",
        attn=f"{layout.block}.{layout.attn}" if layout.attn else None,
        maps={part: inner[part] for part in MAPS if part in inner},
        body=getattr(model, "base_model_prefix", "") or None,
    )


def _split(block: nn.Module, path: str, names: list[str], interleaved: bool, config: Any) -> None:
    """Put the parts of a fused map in its place, in one block; a block without it is left as it is."""
    fused: Any = dict(block.named_modules()).get(path)
    if fused is None:
        return
    weight, bias = fused.weight.detach(), None if fused.bias is None else fused.bias.detach()
    attention = names[0].startswith("attn.")
    heads = getattr(config, "num_attention_heads", 1) if attention else 1
    kv_heads = (getattr(config, "num_key_value_heads", None) or heads) if attention and not interleaved else heads
    each = [heads if part == "attn.q" else kv_heads for part in names]
    if len(weight) % sum(each):
        raise UserError(f"'{path}' has {len(weight)} rows, which are not those of {' and '.join(names)}: correct 'maps' in {FILE}")
    rows = torch.arange(len(weight))
    if interleaved and attention:
        pieces = [piece.flatten() for piece in rows.unflatten(0, (heads, -1)).chunk(len(names), 1)]
    else:
        pieces = list(rows.split([len(weight) * one // sum(each) for one in each]))
    parts = {
        part.split(".")[1]: linear(weight[piece].contiguous(), None if bias is None else bias[piece].contiguous())
        for part, piece in zip(names, pieces, strict=True)
    }
    _put(block, path, Split(parts, heads if interleaved and attention else None))


def _join(block: nn.Module, parts: list[str]) -> None:
    """Put an MLP module where the first of its modules was, and nothing where the others were."""
    joined = Joined(nn.Sequential(*(block.get_submodule(part) for part in parts)), block)
    for part in parts[1:]:
        _put(block, part, nn.Identity())
    _put(block, parts[0], joined)


def _joined(path: str, parts: list[str]) -> str:
    """Where a path inside a block has gone once the modules are joined."""
    for index, part in enumerate(parts):
        if path == part or path.startswith(f"{part}."):
            return f"{parts[0]}.mlp.{index}{path[len(part) :]}"
    return path


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    block.get_submodule(parent)._modules[name] = module


def _examples(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join([path.replace(".0", ".{}") for path in modules if path.endswith(".0")][:4]) or "no numbered modules"


def keep_16_bits(model: nn.Module, architecture: Architecture, stored: torch.dtype | None) -> None:
    """Hold the blocks' linear maps in the 16-bit type of the checkpoint wherever that loses nothing: half the memory, the same logits."""
    if stored not in (torch.bfloat16, torch.float16):
        return
    prefix = architecture.block.split("{}")[0]
    for path, module in list(model.named_modules()):
        if path.startswith(prefix) and type(module) is nn.Linear:
            narrow = module.weight.detach().to(stored)
            if torch.equal(narrow.to(module.weight.dtype), module.weight):
                _put(model, path, linear(narrow, module.bias, Stored16))
