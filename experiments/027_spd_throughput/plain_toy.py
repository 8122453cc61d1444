"""SPD as its published code computes it: every row of the batch, one module after the other, the remainder formed, autograd, plain AdamW.

What other code is measured against, so it is kept as straightforward as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from decomp_bench.decomposer import Decomposer


class PlainToy:
    """One decomposition with scalar gates of a toy, from an SPD's initial weights and settings (constant exponent, straight-through)."""

    def __init__(self, spd: Decomposer) -> None:
        self.config, self.target, self.names = spd.config, spd.target, [site.name for site in spd.sites]
        self.weights = {name: value.detach().clone().requires_grad_() for name, value in spd.named_parameters()}
        self.optimiser = torch.optim.AdamW(self.weights.values(), lr=self.config.lr, weight_decay=0.0, foreach=False, fused=False)
        generator = torch.Generator().manual_seed(spd.seed)
        self.draw: Callable[..., Tensor] = lambda *shape: torch.rand(shape, generator=generator)

    def step(self, x: Tensor) -> None:
        """One step of training."""
        self.optimiser.zero_grad()
        torch.stack(list(self.losses(x).values())).sum().backward()
        self.optimiser.step()

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """The weighted terms on a batch of inputs [rows, d]."""
        config = self.config
        with torch.no_grad():
            inputs, output = self.target.clean(x, self.names)
        lower, minimality, error, entries = {}, [], [], 0
        for name in self.names:
            logits = self.gate(name, inputs[name] @ self.part(name, "V"))
            lower[name] = Straight.apply(logits)
            upper = torch.where(logits > 1, 1 + 0.01 * (logits - 1), logits.clamp(0, 1))
            minimality.append(((upper + config.p_eps) ** config.p).mean(0).sum())
            error.append(self.remainder(name).square().sum())
            entries += self.target.weight(name).numel()
        terms = {"faithfulness": config.faithfulness * torch.stack(error).sum() / entries}
        terms["importance"] = config.importance * torch.stack(minimality).sum()
        terms["stochastic"] = config.stochastic * self.reconstruction(x, output, lower, self.names)
        alone = [self.reconstruction(x, output, lower, [name]) for name in self.names]
        terms["layerwise"] = config.layerwise * torch.stack(alone).mean()
        return terms

    def part(self, name: str, which: str) -> Tensor:
        return self.weights[f"parts.{name.replace('.', '_')}.{which}"]

    def remainder(self, name: str) -> Tensor:
        return self.target.weight(name) - (self.part(name, "V") @ self.part(name, "U")).T

    def gate(self, name: str, strength: Tensor) -> Tensor:
        """C MLPs side by side, each of one component's inner activation."""
        value, layers = strength[..., None], len(self.config.gate_hidden) + 1
        for layer in range(layers):
            weight, bias = (self.weights[f"gates.{name.replace('.', '_')}.{part}.{layer}"] for part in ("weights", "biases"))
            value = torch.einsum("...ci,cio->...co", F.gelu(value) if layer else value, weight) + bias
        return value[..., 0]

    def reconstruction(self, x: Tensor, output: Tensor, lower: dict[str, Tensor], masked: list[str]) -> Tensor:
        """Mean squared error of the output with some maps masked at random."""
        hooks = [self.target.part(name).register_forward_hook(self.masked_map(name, lower[name])) for name in masked]
        try:
            return (self.target(x) - output).square().mean()
        finally:
            for hook in hooks:
                hook.remove()

    def masked_map(self, name: str, lower: Tensor):
        mask, share, bias = lower + (1 - lower) * self.draw(*lower.shape), self.draw(len(lower)), self.target.bias(name)

        def hook(_module, args, _output):
            value = ((args[0] @ self.part(name, "V")) * mask) @ self.part(name, "U") + share[:, None] * (args[0] @ self.remainder(name).T)
            return value if bias is None else value + bias

        return hook


class Straight(torch.autograd.Function):
    """clamp(z, 0, 1), with a slope of 0.01 below 0 for gradients that would raise z."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return torch.where(z <= 0, torch.where(g < 0, 0.01 * g, torch.zeros_like(g)), torch.where(z <= 1, g, torch.zeros_like(g)))
