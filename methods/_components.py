"""Rank-one components of linear maps, and the masked map that parameter decompositions run (SPD, Bushnaq et al. 2025; VPD).

A map y = x W^T + b is written as W = (V U)^T + Delta with V [d_in, C] and U [C, d_out]: component c reads along V[:, c] and writes
along U[c]. With a mask m for each component and delta for the remainder, y = delta (x W^T) + ((x V)(m - delta)) U + b, so Delta is never
formed, and the target's own map comes out where m = delta = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_bench.decomposer import SiteCodes


class Components(nn.Module):
    """V [d_in, C] and U [C, d_out] of one linear map."""

    def __init__(self, V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> None:
        super().__init__()
        self.V, self.U = nn.Parameter(V), nn.Parameter(U)

    @property
    def n(self) -> int:
        return self.V.shape[1]


@dataclass
class RoutedCodes(SiteCodes):
    """Codes of some rows only, for training passes: every other row goes through the target's own map.

    `rows` are indices into the rows flattened to one dimension; strength and gate are [routed, n], delta is [routed] or None (off).
    """

    rows: Int[Tensor, " routed"] | None = None


def random_components(weight: Float[Tensor, "d_out d_in"], n: int, generator: torch.Generator) -> Components:
    """V ~ N(0, 1/d_in), U ~ N(0, 1/C) (SPD's initialisation; a faithfulness warm-up follows it)."""
    d_out, d_in = weight.shape
    V = torch.randn(d_in, n, generator=generator) * d_in**-0.5
    return Components(V, torch.randn(n, d_out, generator=generator) * n**-0.5)


def neuron_components(weight: Float[Tensor, "d_out d_in"], n: int, writes: bool, generator: torch.Generator) -> Components:
    """Component c is neuron c: row c of a map into the hidden layer, or column c of the map out of it (`writes`).

    V U is W^T exactly: spare components have a random V and U = 0, and both norms are balanced by powers of two only. Neurons beyond n
    are left to the remainder.
    """
    d_out, d_in = weight.shape
    made = random_components(weight, n, generator)
    neurons = d_in if writes else d_out
    kept = min(neurons, n)
    W = weight.detach().cpu().float()
    vectors = W[:, :kept].T if writes else W[:kept]
    norms = vectors.norm(dim=1).clamp_min(1e-12)
    scale = torch.exp2(torch.round(0.5 * torch.log2(norms)))
    one_hot = torch.diag(scale)
    with torch.no_grad():
        made.U.zero_()
        if writes:
            made.V[:, :kept] = 0
            made.V[:kept, :kept] = one_hot
            made.U[:kept] = vectors / scale[:, None]
        else:
            made.V[:, :kept] = (vectors / scale[:, None]).T
            made.U[:kept, :kept] = one_hot
    return made


def aligned_components(weight: Float[Tensor, "d_out d_in"], n: int, generator: torch.Generator) -> Components:
    """Random unit directions, of which each U_c is scaled by <u_c v_c^T, W> (SPD paper's initialisation, which no warm-up follows)."""
    d_out, d_in = weight.shape
    V, U = torch.randn(d_in, n, generator=generator), torch.randn(n, d_out, generator=generator)
    return Components(*aligned(V, U, weight.detach().cpu().float()))


def aligned(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"], weight: Float[Tensor, "d_out d_in"]
            ) -> tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]:
    """Directions made unit ones, and each U_c as strong as its component is in W."""
    V, U = V / V.norm(dim=0), U / U.norm(dim=1, keepdim=True)
    return V, U * ((V.T @ weight.T) * U).sum(1, keepdim=True)


def tied_pairs(components: Mapping[str, Components], weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Matrices of which the second is the transpose of the first, and which have as many components."""
    return [
        (one, other)
        for (one, first), (other, second) in combinations(components.items(), 2)
        if first.n == second.n and weights[one].shape == weights[other].T.shape and torch.equal(weights[one], weights[other].T)
    ]


@torch.no_grad()
def tie(components: Mapping[str, Components], weights: Mapping[str, Tensor]) -> None:
    """Let components of a matrix that is another's transpose lie in the memory of the other's, V in U and U in V.

    Both stay parameters with gradients and moments of their own, so that an optimiser's step moves the memory twice, as in SPD's code.
    """
    for one, other in tied_pairs(components, weights):
        components[other].U.data, components[other].V.data = components[one].V.data.T, components[one].U.data.T


def faithfulness(components: Mapping[str, Components], weights: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Mean squared remainder over all entries of the decomposed matrices: sum_l ||W_l - (V_l U_l)^T||^2 / sum_l numel(W_l)."""
    device = next(iter(weights.values())).device
    total = torch.zeros((), device=device)
    with torch.autocast(device.type, enabled=False):  # the remainder is as small as a rounding to bf16
        for name, part in components.items():
            remainder = torch.addmm(weights[name].T, part.V, part.U, beta=-1)
            total = total + remainder.square().sum()
    return total / sum(weights[name].numel() for name in components)


def warm_up(components: Mapping[str, Components], weights: Mapping[str, Tensor], steps: int, lr: float, weight_decay: float = 0.0) -> None:
    """Train V and U on faithfulness alone with an AdamW that is thrown away (SPD main: `faithfulness_warmup`)."""
    parameters = [p for part in components.values() for p in (part.V, part.U)]
    fused = parameters[0].device.type in ("cpu", "cuda")
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    for _ in range(steps):
        optimiser.zero_grad()
        faithfulness(components, weights).backward()
        optimiser.step()
    for parameter in parameters:
        parameter.grad = None


def masked_map(x: Float[Tensor, "*rows d_in"], codes: SiteCodes, U: Float[Tensor, "C d_out"], weight: Float[Tensor, "d_out d_in"],
               bias: Float[Tensor, " d_out"] | None) -> Float[Tensor, "*rows d_out"]:
    """The masked linear map of an input from its codes: delta (x W^T) + (strength (gate - delta)) U + bias."""
    if isinstance(codes, RoutedCodes):
        assert codes.rows is not None
        flat = x.reshape(-1, x.shape[-1])
        value = _RoutedMap.apply(flat, codes.strength, codes.gate, codes.delta, U, weight, codes.rows)
        value = value.view(*x.shape[:-1], -1)  # type: ignore[union-attr]
    elif codes.delta is None:
        value = codes.value @ U
    else:
        delta = codes.delta.unsqueeze(-1)
        value = delta * F.linear(x, weight) + (codes.strength * (codes.gate - delta)) @ U
    return value if bias is None else value + bias


def strengths(x: Float[Tensor, "*rows d_in"], V: Float[Tensor, "d_in C"], codes: SiteCodes | None = None) -> Float[Tensor, "*some C"]:
    """Inner activations x V, of the routed rows alone where the codes have any."""
    if isinstance(codes, RoutedCodes):
        assert codes.rows is not None
        x = x.reshape(-1, x.shape[-1]).index_select(0, codes.rows)
    return x @ V


class _RoutedMap(torch.autograd.Function):
    """The masked map at routed rows and the target's own at the others, computing components of the routed rows only."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # positions are chosen by index on a CPU alone
    def forward(ctx, x, strength, gate, delta, U, weight, rows):
        mixed = strength * gate if delta is None else (gate - delta[:, None]).mul_(strength)
        y = x @ weight.T
        own = y.index_select(0, rows)
        y.index_copy_(0, rows, torch.addmm(own * (0.0 if delta is None else delta[:, None]), mixed, U))
        ctx.save_for_backward(strength, gate, delta, U, weight, rows, mixed, own if ctx.needs_input_grad[3] else None)
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):  # type: ignore[override]
        strength, gate, delta, U, weight, rows, mixed, own = ctx.saved_tensors
        routed = g.index_select(0, rows)
        d_mixed = routed @ U.T
        d_U = mixed.T @ routed if ctx.needs_input_grad[4] else None
        d_gate = d_mixed * strength if ctx.needs_input_grad[2] else None
        d_delta = (routed * own).sum(-1) - (d_mixed * strength).sum(-1) if ctx.needs_input_grad[3] else None
        d_strength = d_mixed.mul_(gate if delta is None else gate - delta[:, None])
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = g.index_copy(0, rows, routed.mul_(0.0 if delta is None else delta[:, None])) @ weight
        return d_x, d_strength, d_gate, d_delta, d_U, None, None
