"""Controls: decompositions that a metric should think little of, made from any method's own config.

Shifted gates need no training: each component is let through where it would be half a row later, so that how often it is active stays and
when it is does not. The others are trained anew with the run's config and seed: on activations whose coordinates were shuffled over
positions, with write matrices that are shuffled and never move, or on a target whose weights are shuffled within each matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from decomp_bench.data.sources import Source
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Batch, Codes, Decomposer, Inputs, SiteCodes
from decomp_bench.replacement import clean_points, clean_reads
from decomp_bench.targets.base import TargetModel, identity_of

UNTRAINED = "nothing is trained"
TIED = "it has no write matrix that its codes do not depend on"


def shifted_gates(decomposer: Decomposer) -> Decomposer:
    """A view of the same weights whose gates are those of half a row later (of a toy's rows, half a batch later)."""
    kind = type(decomposer)

    class Shifted(kind):  # type: ignore[misc, valid-type]
        name = kind.name

        def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
            if gates is not None:
                return super().encode(inputs, gates)
            real = getattr(inputs, "real", None)
            shifted = {name: self._shifted(code, real) for name, code in super().encode(inputs).items()}
            return super().encode(inputs, shifted)

        def _shifted(self, code: SiteCodes, real: Tensor | None) -> SiteCodes:
            gate = code.gate
            if real is None:
                return replace(code, gate=gate.roll(gate.shape[0] // 2, 0))
            length = (real.sum(1) - int(self.target.keeps_first)).clamp(min=1)[:, None]
            place = torch.arange(gate.shape[1], device=gate.device)
            source = torch.where(place < length, (place + length // 2) % length, place)
            return replace(code, gate=gate.gather(1, source[..., None].expand_as(gate)))

    view = copy.copy(decomposer)
    view.__class__ = Shifted
    return view


def of_shuffled_activations(kind: type[Decomposer]) -> type[Decomposer]:
    """The method, trained on clean activations each of whose coordinates was shuffled over the positions of its batch."""

    class Shuffled(kind):  # type: ignore[misc, valid-type]
        name = kind.name
        _drawn: torch.Generator | None = None

        def _shuffle(self, batch: Batch) -> Batch:
            if self._drawn is None:
                self._drawn = torch.Generator().manual_seed(self.seed)
            kept = None if batch.x is None else positions(batch, self.target.keeps_first).cpu().flatten().nonzero().squeeze(1)
            return replace(batch, clean={point: _shuffled(value, kept, self._drawn) for point, value in batch.clean.items()})

        def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            return super().loss(self._shuffle(batch), progress)

        def before_training(self, data: Iterator[Batch]) -> None:
            super().before_training(map(self._shuffle, data))

        def finish(self, data: Iterator[Batch]) -> None:
            super().finish(map(self._shuffle, data))

    return Shuffled


def _shuffled(value: Tensor, kept: Tensor | None, generator: torch.Generator) -> Tensor:
    """Each coordinate of the kept rows of [..., d] in an order of its own."""
    rows = value.reshape(-1, value.shape[-1]).clone()
    kept = torch.arange(len(rows)) if kept is None else kept
    order = torch.rand(len(kept), rows.shape[1], generator=generator).argsort(0)
    kept = kept.to(rows.device)
    rows[kept] = rows[kept].gather(0, order.to(rows.device))
    return rows.view(value.shape)


def with_frozen_decoder(kind: type[Decomposer]) -> type[Decomposer]:
    """The method with write matrices that stay as `freeze_decoder` left them."""

    class Frozen(kind):  # type: ignore[misc, valid-type]
        name = kind.name
        fixed: dict[nn.Parameter, Tensor]

        @torch.no_grad()
        def put_back(self) -> None:
            for parameter, value in getattr(self, "fixed", {}).items():
                parameter.copy_(value)

        def before_training(self, data: Iterator[Batch]) -> None:
            super().before_training(data)
            self.put_back()

        def after_step(self, progress: float) -> None:
            super().after_step(progress)
            self.put_back()

    return Frozen


def freeze_decoder(decomposer: Decomposer, source: Source) -> int:
    """Shuffle and fix the matrices that `decode` depends on and `encode` does not; returns how many there are."""
    batch = with_clean(source, source.batch("train", _first(source)), clean_points(decomposer))
    reads = clean_reads(decomposer, batch)
    parameters = [parameter for parameter in decomposer.parameters() if parameter.dim() > 1 and parameter.requires_grad]
    with torch.enable_grad():
        codes = decomposer.train().encode(reads)
        read = _touched([part for code in codes.values() for part in (code.strength, code.gate)], parameters)
        fixed = {name: replace(code, strength=code.strength.detach(), gate=code.gate.detach()) for name, code in codes.items()}
        writes = sorted({slot.write for site in decomposer.sites for slot in site.slots})
        written = _touched([decomposer.decode(fixed, write, reads) for write in writes], parameters)
    own = [p for p, decodes, encodes in zip(parameters, written, read, strict=True) if decodes and not encodes]
    generator = torch.Generator().manual_seed(decomposer.seed)
    with torch.no_grad():
        for parameter in own:
            parameter.copy_(_reordered(parameter, generator))
    decomposer.fixed = {parameter: parameter.detach().clone() for parameter in own}  # type: ignore[assignment]
    return len(own)


def _first(source: Source):
    import numpy as np

    return np.arange(min(4, source.size("train")))


def _touched(outputs: list[Tensor], parameters: list[nn.Parameter]) -> list[bool]:
    """Which parameters the outputs depend on."""
    outputs = [output.float().sum() for output in outputs if output.requires_grad]
    if not outputs or not parameters:
        return [False] * len(parameters)
    return [grad is not None for grad in torch.autograd.grad(torch.stack(outputs).sum(), parameters, allow_unused=True)]


def _reordered(value: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(value.numel(), generator=generator)
    return value.flatten()[order.to(value.device)].view(value.shape)


def on_random_target(source: Source, seed: int) -> Source:
    """The same tokens for a copy of the target in which the entries of every matrix are shuffled, vectors left as they are."""
    target: TargetModel = copy.copy(source.target)
    target.module = copy.deepcopy(source.target.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in target.module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(_reordered(parameter, generator))
    target.bridge = None
    target.identity = identity_of(target.module)
    made = copy.copy(source)
    made.target = target
    return made
