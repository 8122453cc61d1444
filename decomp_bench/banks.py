"""Components of a site as vectors or matrices, and how alike those of two decompositions are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decomp_bench.decomposer import Decomposer, Site
from decomp_bench.matching import cosines


@dataclass(frozen=True)
class Bank:
    """Components of a site in each of its slots: pairs of vectors, or matrices where they are of a higher rank; None of neither."""

    vectors: list[tuple[Tensor, Tensor]] | None
    matrices: list[Tensor] | None

    @staticmethod
    def of(decomposer: Decomposer, site: Site, alive: Tensor) -> Bank:
        """The alive components of a decomposition."""
        pairs = [decomposer.directions(site, slot) for slot in site.slots]
        whole = [None if pair else decomposer.matrices(site, slot) for pair, slot in zip(pairs, site.slots, strict=True)]

        def chosen(value: Tensor) -> Tensor:
            return value.detach().float()[alive.to(value.device)].cpu()

        vectors = [(chosen(pair[0]), chosen(pair[1])) for pair in pairs if pair is not None]
        matrices = [chosen(value) for value in whole if value is not None]
        several = len({slot.read for slot in site.slots}) > 1  # then each pair of vectors has a sign of its own
        if len(vectors) == len(pairs) and several:
            return Bank(None, [_outer(pair) for pair in vectors])
        return Bank(vectors if len(vectors) == len(pairs) else None, matrices if len(matrices) == len(pairs) else None)

    def random(self, generator: torch.Generator) -> Bank:
        """As many components of random directions."""

        def drawn(value: Tensor) -> Tensor:
            return torch.randn(value.shape, generator=generator)

        vectors = [(drawn(read), drawn(write)) for read, write in self.vectors] if self.vectors is not None else None
        return Bank(vectors, [drawn(value) for value in self.matrices] if self.matrices is not None else None)

    def flat(self) -> Float[Tensor, "n entries"] | None:
        """Every entry of the components' matrices."""
        parts = self.matrices if self.vectors is None else [_outer(pair) for pair in self.vectors]
        return None if parts is None else torch.cat([part.flatten(1) for part in parts], 1)


def _outer(pair: tuple[Tensor, Tensor]) -> Float[Tensor, "n d_in d_out"]:
    return pair[0][:, :, None] * pair[1][:, None, :]


def similarities(first: Bank, second: Bank) -> dict[str, Float[Tensor, "n m"]]:
    """|cosine| of read vectors, of write vectors and of whole components, where they have them."""
    if first.vectors is None or second.vectors is None:
        flat = first.flat(), second.flat()
        return {} if flat[0] is None or flat[1] is None else {"whole": cosines(flat[0], flat[1]).abs()}
    whole = torch.stack([(a[0] @ b[0].T) * (a[1] @ b[1].T) for a, b in zip(first.vectors, second.vectors, strict=True)]).sum(0)
    lengths = [torch.stack([r.norm(dim=1) * w.norm(dim=1) for r, w in bank]).norm(dim=0) for bank in (first.vectors, second.vectors)]
    reads, writes = ([torch.cat([pair[end] for pair in bank], 1) for bank in (first.vectors, second.vectors)] for end in (0, 1))
    found = {"read": cosines(*reads).abs(), "write": cosines(*writes).abs()}
    return found | {"whole": whole.abs() / (lengths[0][:, None] * lengths[1]).clamp_min(1e-30)}
