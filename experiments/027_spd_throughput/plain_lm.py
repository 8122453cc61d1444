"""SPD and VPD on a language model as their published code computes them: whole batches, the remainder formed in each masked pass, maps
run where nothing is routed to them, the gate network run anew for each map, autograd, plain AdamW.

What other code is measured against, so it is kept as straightforward as it is.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from decomp_bench.decomposer import Decomposer

from .plain_toy import Straight


class PlainLM:
    """One decomposition of MLP matrices with a gate network for each MLP, from an SPD's initial weights and settings: subset routing,
    smooth L0 of constant width, and an adversary with a source for each position where there is one."""

    def __init__(self, spd: Decomposer) -> None:
        self.config, self.target, self.names = spd.config, spd.target, [site.name for site in spd.sites]
        self.parts = {name: [part.detach().clone().requires_grad_() for part in (one.V, one.U)] for name, one in spd.components.items()}
        self.gates: nn.ModuleDict = copy.deepcopy(spd.gates)
        groups = [[part for pair in self.parts.values() for part in pair], list(self.gates.parameters())]
        self.clips = [self.config.clip, self.config.gate_clip]
        rates = [self.config.lr, self.config.gate_lr]
        self.optimiser = torch.optim.AdamW([{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
                                           weight_decay=0.0, foreach=False, fused=False)  # fmt: skip
        generator = torch.Generator().manual_seed(spd.seed)
        self.draw: Callable[..., Tensor] = lambda *shape: torch.rand(shape, generator=generator)
        self.sources: dict[str, Tensor] = {}
        self.moments: dict[str, list[Tensor]] = {}
        self.ascents = 0

    def step(self, x: Tensor) -> None:
        """One step of training."""
        self.optimiser.zero_grad()
        torch.stack(list(self.losses(x).values())).sum().backward()
        for group, clip in zip(self.optimiser.param_groups, self.clips, strict=True):
            if clip is not None:
                nn.utils.clip_grad_norm_(group["params"], clip, foreach=False)
        self.optimiser.step()
        if self.config.adversarial:
            self.climb({name: source.grad / self.config.adversarial for name, source in self.sources.items()})

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """The weighted terms on a batch of token ids [B, T]."""
        config, layers = self.config, {name: name.split(".")[0] for name in self.names}
        with torch.no_grad():
            inputs, output = self.target.clean(x, {f"{layer}.mlp.in" for layer in layers.values()})
        lower, minimality, error, entries = {}, [], [], 0
        for name, layer in layers.items():
            logits = self.gates[f"{layer}_mlp"](inputs[f"{layer}.mlp.in"], name.replace(".", "_"))
            lower[name] = Straight.apply(logits)
            upper = torch.where(logits > 1, 1 + 0.01 * (logits - 1), logits.clamp(0, 1))[:, 1:].flatten(0, 1)
            phi = upper**2 / (upper**2 + config.gamma**2)
            minimality.append((phi.mean(0) * (1 + config.beta * torch.log2(1 + phi.sum(0)))).sum())
            error.append(self.remainder(name).square().sum())
            entries += self.target.weight(name).numel()
        terms = {"faithfulness": config.faithfulness * torch.stack(error).sum() / entries}
        terms["importance"] = config.importance * torch.stack(minimality).sum()
        drawn = {name: (self.draw(*g.shape), self.draw(*g.shape[:2])) for name, g in lower.items()}
        terms["subset"] = config.subset * self.divergence(x, output, lower, drawn, self.route(*x.shape))
        if config.adversarial:
            terms["adversarial"] = config.adversarial * self.adversary(x, output, lower)
        return terms

    def route(self, batch: int, positions: int) -> Tensor:
        """For each position a uniform size k, then a random k-subset of the maps; none at the first."""
        size = (self.draw(batch, positions, 1) * len(self.names)).floor() + 1
        routed = self.draw(batch, positions, len(self.names)).argsort(-1).argsort(-1) < size
        routed[:, 0] = False
        return routed

    def remainder(self, name: str) -> Tensor:
        V, U = self.parts[name]
        return self.target.weight(name) - (V @ U).T

    def divergence(self, x: Tensor, output: Tensor, lower: dict[str, Tensor], drawn: dict[str, tuple[Tensor, Tensor]], routed: Tensor
                   ) -> Tensor:
        """KL(target || masked), mean over the positions after the first."""
        hooks = [self.target.part(name).register_forward_hook(self.masked_map(name, lower[name], *drawn[name], routed[..., place]))
                 for place, name in enumerate(self.names)]  # fmt: skip
        try:
            log_q = self.target(x).log_softmax(-1)
        finally:
            for hook in hooks:
                hook.remove()
        log_p = output.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)[:, 1:].mean()

    def masked_map(self, name: str, lower: Tensor, source: Tensor, share: Tensor, routed: Tensor):
        (V, U), bias = self.parts[name], self.target.bias(name)
        mask = lower + (1 - lower) * source

        def hook(_module, args, whole):
            value = ((args[0] @ V) * mask) @ U + share[..., None] * (args[0] @ self.remainder(name).T)
            return torch.where(routed[..., None], value if bias is None else value + bias, whole)

        return hook

    # ---- the adversary

    def adversary(self, x: Tensor, output: Tensor, lower: dict[str, Tensor]) -> Tensor:
        """The error under sources that climb it before the step's own pass."""
        everywhere = torch.ones(*x.shape, len(self.names), dtype=torch.bool)
        everywhere[:, 0] = False
        if not self.sources:
            self.sources = {name: self.draw(*g.shape[:2], g.shape[2] + 1) for name, g in lower.items()}
        fixed = {name: g.detach() for name, g in lower.items()}
        for _ in range(self.config.adversary_steps):
            error = self.divergence(x, output, fixed, self.leaves(), everywhere)
            self.climb(dict(zip(self.sources, torch.autograd.grad(error, list(self.sources.values())), strict=True)))
        return self.divergence(x, output, lower, self.leaves(), everywhere)

    def leaves(self) -> dict[str, tuple[Tensor, Tensor]]:
        self.sources = {name: source.detach().requires_grad_() for name, source in self.sources.items()}
        return {name: (source[..., :-1], source[..., -1]) for name, source in self.sources.items()}

    @torch.no_grad()
    def climb(self, gradients: dict[str, Tensor]) -> None:
        """One step of Adam up the gradients, and back into [0, 1]."""
        self.ascents += 1
        (first, second), rate = self.config.adversary_betas, self.config.adversary_lr
        for name, gradient in gradients.items():
            mean, square = self.moments.setdefault(name, [torch.zeros_like(gradient), torch.zeros_like(gradient)])
            mean.mul_(first).add_(gradient, alpha=1 - first)
            square.mul_(second).add_(gradient**2, alpha=1 - second)
            scale = (square / (1 - second**self.ascents)).sqrt() + 1e-8
            self.sources[name] = (self.sources[name] + rate * mean / (1 - first**self.ascents) / scale).clamp(0, 1)
