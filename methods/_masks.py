"""Random numbers for masks, and which positions run a map's components (SPD: stochastic masks; VPD: subset routing)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BANK = 1 << 22


class Uniforms:
    """Uniform numbers in [0, 1) from a generator of its own, whose state a resume takes back.

    On the CPU they are windows into a bank of four million numbers drawn once, each at a random offset: drawing afresh takes as long as
    a matrix product. Windows are views and must not be written to.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generator: torch.Generator | None = None
        self._bank: Tensor | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator, made on the first call for the device at hand."""
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def draw(self, *shape: int, device: torch.device) -> Float[Tensor, ...]:
        """Uniform numbers of a shape, read-only."""
        size = int(torch.Size(shape).numel())
        generator = self.generator(device)
        if device.type != "cpu" or size < 4096 or size > BANK:
            return torch.rand(shape, generator=generator, device=device)
        if self._bank is None:
            self._bank = torch.rand(BANK, generator=torch.Generator().manual_seed(self.seed))
        offset = int(torch.randint(BANK - size + 1, (1,), generator=generator))
        return self._bank[offset : offset + size].view(shape)

    def state(self, device: torch.device) -> Tensor:
        """State of the generator, as a byte tensor."""
        return self.generator(device).get_state()

    def load(self, state: Tensor, device: torch.device) -> None:
        """Take back what `state` gave."""
        self.generator(device).set_state(state)


def uniform_subset(rows: int, maps: int, uniforms: Uniforms, device: torch.device) -> Bool[Tensor, "rows maps"]:
    """For each row a uniform size k in 1..maps, then a random k-subset of the maps: where components run (SPD main, VPD)."""
    size = (uniforms.draw(rows, 1, device=device) * maps).floor() + 1
    rank = torch.rand(rows, maps, generator=uniforms.generator(device), device=device).argsort(-1).argsort(-1)
    return rank < size


def interpolate(lower: Float[Tensor, "rows C"], source: Float[Tensor, "rows C"]) -> Float[Tensor, "rows C"]:
    """Masks g + (1 - g) r between the importance and one."""
    return _Interpolate.apply(lower, source)  # type: ignore[return-value]


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lower, source):
        ctx.save_for_backward(lower, source)
        return torch.lerp(source, torch.ones((), dtype=source.dtype, device=source.device), lower)

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        lower, source = ctx.saved_tensors
        d_source = torch.addcmul(g, g, lower, value=-1) if ctx.needs_input_grad[1] else None
        return (torch.addcmul(g, g, source, value=-1) if ctx.needs_input_grad[0] else None), d_source
