"""Causal-importance networks: what gives each component its logit, and from which activations. Names are those of the published configs.

| gate | network | reads | source |
|---|---|---|---|
| `scalar` (`mlp`) | C MLPs 1 -> hidden -> 1 | each component's inner activation x V | SPD paper and main |
| `vector_mlp` | C MLPs d_in -> hidden -> 1 | the map's input | SPD main |
| `shared_mlp` | one MLP a map | the map's input | SPD main |
| `shared` | one MLP for the maps of a unit | the unit's input, scaled to RMS one | this project |
| `global_shared_mlp` | one MLP | the inputs of all maps | VPD code |
| `global_shared_transformer` | one bidirectional transformer | the inputs of all maps, normalised | VPD (nano_param_decomp) |
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_bench.decomposer import Inputs, Point, Reads, Site
from decomp_bench.errors import UserError

if TYPE_CHECKING:
    from decomp_bench.targets import TargetModel

    from ._spd_config import SPDConfig

Gate = Literal["shared", "scalar", "vector_mlp", "shared_mlp", "global_shared_mlp", "global_shared_transformer"]
GLOBAL = ("global_shared_mlp", "global_shared_transformer")
EVERYWHERE = "all"
"""Name of a global network among the gates of units and sites."""


def key_of(point: Point) -> str:
    """A point as a module name, which cannot hold dots."""
    return point.replace(".", "_")


def unit_gates(config: SPDConfig, target: TargetModel, unit: str, sites: list[Site], generator: torch.Generator) -> dict[str, nn.Module]:
    """Gates of the sites of one unit (`0.mlp`), by name: one for the unit, or one for each site."""
    first, hidden, bias = sites[0].name, config.gate_hidden, config.gate_bias
    wide = (len(target.weight(first)),) if hidden is None else hidden
    if config.gate == "shared":
        made = SharedGates(target.size(f"{unit}.in"), wide, {key_of(site.name): site.n for site in sites}, bias, generator)
        if unit.endswith(".mlp") and not first.endswith(".down") and config.init == config.gate_init == "neuron":
            made.start_at_neurons(target.weight(first))  # the activated map: the gate of a gated MLP
        return {key_of(unit): made}
    found: dict[str, nn.Module] = {}
    for site in sites:
        key, d_in = key_of(site.name), target.size(site.name)
        if config.gate == "scalar":
            found[key] = ScalarGates(site.n, (16,) if hidden is None else hidden, bias, generator)
        elif config.gate == "vector_mlp":
            found[key] = VectorGates(site.n, d_in, (8,) if hidden is None else hidden, bias, generator)
        else:
            found[key] = SharedGates(d_in, wide, {key: site.n}, bias, generator)
    return found


def global_gates(config: SPDConfig, target: TargetModel, sites: list[Site], generator: torch.Generator) -> nn.Module:
    """One network for all sites; raises UserError for a transformer's width that its heads do not split."""
    sizes = {key_of(site.name): site.n for site in sites}
    d_in, width, heads = sum(target.size(site.name) for site in sites), config.gate_width, config.gate_heads
    if config.gate == "global_shared_mlp":
        hidden = (len(target.weight(sites[0].name)),) if config.gate_hidden is None else config.gate_hidden
        return SharedGates(d_in, hidden, sizes, config.gate_bias, generator)
    if width % (2 * heads):
        raise UserError(f"gate_width={width} does not split into gate_heads={heads} heads of even width; take a multiple of {2 * heads}")
    hidden = (4 * width,) if config.gate_hidden is None else config.gate_hidden
    return TransformerGates(d_in, width, config.gate_blocks, heads, hidden, config.gate_rope, sizes, config.gate_bias, generator)


def gate_logits(kind: Gate, gates: nn.ModuleDict, sites: list[Site], inputs: Inputs, strength: Inputs) -> dict[Point, Tensor]:
    """Logits of some sites [*rows, C] at the positions of `inputs`; `strength` holds the inner activations that scalar gates read."""
    if kind in ("scalar", "vector_mlp"):
        return {site.name: gates[key_of(site.name)](strength[site.name] if kind == "scalar" else inputs[site.name]) for site in sites}
    hidden: dict[str, Tensor] = {}
    found = {}
    for site in sites:
        key = EVERYWHERE if kind in GLOBAL else key_of(site.gates_from[0].removesuffix(".in"))
        network = gates[key]
        if key not in hidden:
            hidden[key] = _features(network, inputs, site.gates_from)  # type: ignore[arg-type]
        found[site.name] = network.out[key_of(site.name)](hidden[key])  # type: ignore[index]
    return found


def _features(network: SharedGates | TransformerGates, inputs: Inputs, sources: tuple[Point, ...]) -> Tensor:
    """The last hidden layer at the positions of `inputs`, from what the sources read; a transformer sees the rest of the row too."""
    if isinstance(network, SharedGates):
        return network.features(inputs[sources[0]] if len(sources) == 1 else torch.cat([inputs[point] for point in sources], -1))
    if not isinstance(inputs, Reads):
        return network.features([inputs[point] for point in sources])
    features = network.features([inputs.whole(point) for point in sources], inputs.real)
    return features[:, 1:] if inputs.first else features


class ScalarGates(nn.Module):
    """C independent MLPs 1 -> hidden -> 1 of each component's inner activation; hidden of length 0 is an affine map."""

    d_in = 1

    def __init__(self, n: int, hidden: Sequence[int], bias: float, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [self.d_in, *hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (d_in, d_out) in enumerate(pairwise(sizes)):
            last = i == len(hidden)
            scale = (1 if last else 2) ** 0.5 * d_in**-0.5
            self.weights.append(nn.Parameter(torch.randn(n, d_in, d_out, generator=generator) * scale))
            self.biases.append(nn.Parameter(torch.full((n, d_out), bias if last else 0.0)))

    def forward(self, strength: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        """Logits from inner activations."""
        return self._upwards(_layer(strength.unsqueeze(-1), self.weights[0], self.biases[0]))

    def _upwards(self, value: Float[Tensor, "*rows C hidden"]) -> Float[Tensor, "*rows C"]:
        """Logits from what the first layer gives."""
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            value = _layer(F.gelu(value), weight, bias)
        return value.squeeze(-1)


class VectorGates(ScalarGates):
    """C independent MLPs d_in -> hidden -> 1 of what a map reads."""

    def __init__(self, n: int, d_in: int, hidden: Sequence[int], bias: float, generator: torch.Generator) -> None:
        self.d_in = d_in
        super().__init__(n, hidden, bias, generator)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows C"]:
        """Logits from a map's input."""
        return self._upwards(torch.einsum("...i,cio->...co", x, self.weights[0]) + self.biases[0])


def _layer(value: Float[Tensor, "*rows C d_in"], weight: Float[Tensor, "C d_in d_out"], bias: Float[Tensor, "C d_out"]
           ) -> Float[Tensor, "*rows C d_out"]:
    """C affine maps side by side."""
    if weight.shape[1] == 1:
        return value * weight[:, 0] + bias
    if weight.shape[2] == 1:
        return (value * weight[..., 0]).sum(-1, keepdim=True) + bias
    return torch.einsum("...ci,cio->...co", value, weight) + bias


class SharedGates(nn.Module):
    """One MLP for all components of some sites: of a map, of a unit's maps, or of all maps.

    `scale` multiplies the input; for a unit's maps it is set to 1 / RMS of the clean activations before training. Each site has its own
    output layer, so that one site's logits can be had without the others'.
    """

    scale: Tensor

    def __init__(self, d_in: int, hidden: Sequence[int], sites: dict[str, int], bias: float, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [d_in, *hidden]
        self.register_buffer("scale", torch.ones(()))
        self.hidden = nn.ModuleList(_linear(a, b, 2.0, 0.0, generator) for a, b in pairwise(sizes))
        self.out = nn.ModuleDict({name: _linear(sizes[-1], n, 1.0, bias, generator) for name, n in sites.items()})

    @torch.no_grad()
    def start_at_neurons(self, weight: Float[Tensor, "neurons d_in"]) -> None:
        """Let hidden unit c be neuron c, which opens component c of every site, on top of weakened random weights.

        Importances then start from how active a neuron is, as the untrained baseline "top neurons" does, instead of from noise: on the
        TinyStories model this halves the cross-entropy lost after 300 steps.
        """
        first = cast(nn.Linear, self.hidden[0]).weight
        weight = weight.detach().to(first)
        directions = weight * (2**0.5 / weight.norm(dim=1, keepdim=True).clamp_min(1e-12))
        kept = min(len(directions), len(first))
        first[:kept] = directions[:kept]
        for layer in self.out.values() if len(self.hidden) == 1 else ():
            layer = cast(nn.Linear, layer)
            layer.weight.mul_(0.5)
            own = range(min(kept, len(layer.weight)))
            layer.weight[own, own] += 1.0

    def features(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows hidden"]:
        """The last hidden layer, which all sites share."""
        x = x * self.scale
        for layer in self.hidden:
            x = F.gelu(layer(x))
        return x

    def forward(self, x: Float[Tensor, "*rows d_in"], site: str) -> Float[Tensor, "*rows C"]:
        """Logits of one site."""
        return self.out[site](self.features(x))


class TransformerGates(nn.Module):
    """A transformer over positions without a causal mask, of the normalised inputs of all maps together (VPD).

    Blocks normalise before attention and MLP (RMS, no gain; the machine's epsilon), attend with split-half rotary positions and have a
    GELU MLP; nothing is normalised after them. Rotation is relative, so it does not matter at which position a row starts.
    """

    def __init__(self, d_in: int, width: int, blocks: int, heads: int, hidden: Sequence[int], rope: float, sites: dict[str, int],
                 bias: float, generator: torch.Generator) -> None:
        super().__init__()
        self.inward = _linear(d_in, width, 2.0, 0.0, generator)
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, rope, generator) for _ in range(blocks))
        self.out = nn.ModuleDict({name: _linear(width, n, 1.0, bias, generator) for name, n in sites.items()})

    def features(self, parts: Sequence[Float[Tensor, "*rows _"]], real: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "*rows width"]:
        """The last block's output, which all sites share, from the input of each map: [B, T, d], or rows [B, d] that do not see each other.

        `real` marks the positions that are not padding; the others are seen by nobody but themselves.
        """
        x = self.inward(torch.cat([_normalised(part) for part in parts], -1))
        rows = x.dim() == 2
        x = x.unsqueeze(-2) if rows else x
        seen = None
        if real is not None:
            seen = real[:, None, None, :] | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        for block in self.blocks:
            x = block(x, seen)
        return x.squeeze(-2) if rows else x


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: Sequence[int], rope: float, generator: torch.Generator) -> None:
        super().__init__()
        self.heads, self.rope = heads, rope
        self.q, self.k, self.v, self.o = (_projection(width, generator) for _ in range(4))
        sizes = [width, *hidden]
        self.hidden = nn.ModuleList(_linear(a, b, 2.0, 0.0, generator) for a, b in pairwise(sizes))
        self.out = _linear(sizes[-1], width, 1.0, 0.0, generator)

    def forward(self, x: Float[Tensor, "B T width"], seen: Bool[Tensor, "B 1 T T"] | None) -> Float[Tensor, "B T width"]:
        normal = _normalised(x)
        q, k, v = (layer(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(_rotated(q, self.rope), _rotated(k, self.rope), v, attn_mask=seen)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        value = _normalised(x)
        for layer in self.hidden:
            value = F.gelu(layer(value))
        return x + self.out(value)


def _normalised(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    return F.rms_norm(x, (x.shape[-1],))


def _rotated(x: Float[Tensor, "B heads T d"], base: float) -> Float[Tensor, "B heads T d"]:
    """Rotary positions: the pair (i, i + d/2) turned by position * base^(-2i/d)."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(x.shape[-2], device=x.device, dtype=torch.float32), speed)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _linear(d_in: int, d_out: int, gain: float, bias: float, generator: torch.Generator) -> nn.Linear:
    made = nn.Linear(d_in, d_out)
    with torch.no_grad():
        made.weight.copy_(torch.randn(d_out, d_in, generator=generator) * (gain / d_in) ** 0.5)
        made.bias.fill_(bias)
    return made


def _projection(width: int, generator: torch.Generator) -> nn.Linear:
    """A square map without bias, uniform as torch initialises it."""
    made = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        made.weight.copy_((2 * torch.rand(width, width, generator=generator) - 1) * width**-0.5)
    return made
