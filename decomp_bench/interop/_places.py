"""What other tools call the places of a model, and which of our points that is: what an MLP reads (after its norm) and what it writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from decomp_bench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from decomp_bench.targets import TargetModel

End = Literal["in", "out"]

RESIDUAL = "is the residual stream, which has no place here: what is replaced and scored is the MLPs"
BEFORE_NORM = "is the stream before the MLP's norm, and an MLP is replaced from what it reads after the norm"
ATTENTION = "belongs to attention, and what is replaced and scored is the MLPs"

HOOKS: dict[str, tuple[End, bool]] = {
    "hook_mlp_out": ("out", False),
    "mlp.hook_out": ("out", False),
    "mlp.hook_in": ("in", False),
    "ln2.hook_normalized": ("in", True),  # before the norm's gain
    "ln2.hook_out": ("in", False),
}
"""TransformerLens names after `blocks.N.`: the end of the MLP, and whether the norm's gain is still to come."""
NORMS = ("post_attention_layernorm", "ln_2", "ln2", "rms_2", "norm2")
MODULE = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)(?:\.(.+))?$")


@dataclass(frozen=True)
class Place:
    """A layer's MLP at one end, as far as a name tells; `ungained`: the norm's gain has not been applied there."""

    layer: int | None = None
    end: End | None = None
    ungained: bool = False


def place(name: str | None, side: End) -> Place:
    """The place behind a hook or module name; `side` says whether the coder reads or writes there, as a module has both.

    An unknown name gives an empty place; a known one that is no MLP's end raises UserError with the reason.
    """
    found = MODULE.search(name or "")
    if found is None:
        return Place()
    layer, rest = int(found[1]), found[2] or ""
    if rest in HOOKS:
        return Place(layer, *HOOKS[rest])
    if rest == "mlp":
        return Place(layer, side)
    if rest in NORMS and side == "in":
        return Place(layer, "in")
    if rest in ("hook_resid_mid", "hook_mlp_in"):
        raise UserError(f"{name} {BEFORE_NORM}; retrain it on blocks.{layer}.mlp.hook_in")
    if rest in ("", "hook_resid_pre", "hook_resid_post"):
        raise UserError(f"{name} {RESIDUAL}")
    if re.match(r"(hook_)?(self_)?att", rest):
        raise UserError(f"{name} {ATTENTION}")
    return Place(layer)


def between(read: str | None, write: str | None) -> Place:
    """Where a coder reads that is known by the names of what it reads and writes; raises UserError where it writes to no MLP output."""
    source, goal = place(read, "out" if read == write else "in"), place(write, "out")
    if source.layer is not None and goal.layer not in (None, source.layer):
        raise UserError(f"it reads at layer {source.layer} and writes at {goal.layer}; a coder of one MLP reads and writes at the same")
    if goal.end == "in":
        raise UserError(f"it writes to {write}, what an MLP reads; here coders write to what an MLP writes")
    return Place(source.layer if source.layer is not None else goal.layer, source.end, source.ungained)


def gain(target: TargetModel, layer: int) -> tuple[Tensor, Tensor]:
    """Weight and bias that the norm before a layer's MLP applies last (ones and zeros where there is none).

    Found by running the block: the child of one-dimensional weight whose output is what the MLP reads.
    """
    import torch

    if not target.is_lm:
        return torch.ones(target.width), torch.zeros(target.width)
    block, point = target.part(str(layer)), f"{layer}.mlp.in"
    found: dict[str, Tensor] = {}
    norms: dict[str, Any] = {name: child for name, child in block.named_children() if getattr(child, "weight", torch.zeros(())).dim() == 1}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _arguments, output: found.update({name: output})

    handles = [child.register_forward_hook(keep(name)) for name, child in norms.items()]
    try:
        read = target.clean(torch.arange(4, device=target.device)[None], [point], logits=False)[0][point]
    finally:
        for handle in handles:
            handle.remove()
    for name, output in found.items():
        if torch.equal(output, read):
            weight, bias = norms[name].weight.detach().cpu(), getattr(norms[name], "bias", None)
            return weight, torch.zeros_like(weight) if bias is None else bias.detach().cpu()
    return torch.ones(target.width), torch.zeros(target.width)
