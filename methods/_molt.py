"""Low-rank linear maps that gates switch on, and the coder that holds them for one site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._activations import Code, of_lengths
from ._coder import ENCODER_SCALE, SparseCoder
from ._dictionary_config import DictionaryConfig
from ._jumprelu import JumpReLU, _Step
from ._sparse import Support, support_of

ENTRY_COST = 32
"""What fetching a row for one map and adding its result costs, in units of rank: what makes small maps faster all together."""


def runs_apart(active: int, rows: int, n: int, rank: int) -> bool:
    """Whether n maps run one by one, each on the rows where it is active, rather than together on every row (by measurement)."""
    return active * (rank + ENTRY_COST) < 0.6 * rows * n * rank


class LowRankMaps(nn.Module):
    """Maps x -> (x V_t^T) U_t in groups of equal rank: V [n, rank, d_in] and U [n, rank, d_out] of each group (n, rank).

    They start so that inputs of variance one give latents and outputs of variance one.
    """

    def __init__(self, groups: list[tuple[int, int]], d_in: int, d_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.groups, self.width = groups, d_out
        pairs = [(torch.randn(n, r, d_in, generator=generator), torch.randn(n, r, d_out, generator=generator)) for n, r in groups]
        self.V = nn.ParameterList([nn.Parameter(V / d_in**0.5) for V, _ in pairs])
        self.U = nn.ParameterList([nn.Parameter(U / U.shape[1] ** 0.5) for _, U in pairs])

    @property
    def ranks(self) -> Int[Tensor, " n"]:
        """The rank of each map."""
        return torch.cat([torch.full((n,), rank) for n, rank in self.groups])

    def lengths(self) -> Float[Tensor, " n"]:
        """Frobenius norm of each map, from its factors' Gram matrices: no map is ever formed."""
        squares = [((V @ V.mT).float() * (U @ U.mT).float()).sum((1, 2)) for V, U in zip(self.V, self.U, strict=True)]
        return torch.cat(squares).clamp(min=1e-24).sqrt()

    def forward(self, x: Float[Tensor, "rows d_in"], gates: Tensor, support: Support | None) -> Float[Tensor, "rows d_out"]:
        """The sum of all maps, each times its gate: `gates` are dense [rows, n], or a support's entries."""
        total, start = x.new_zeros(len(x), self.width), 0
        for (n, _), V, U in zip(self.groups, self.V, self.U, strict=True):
            if support is None:
                total = total + _together(x, gates[:, start : start + n], V, U)
            else:
                total = total + self._group(x, gates, support, start, V, U)
            start += n
        return total

    def _group(self, x: Tensor, gates: Tensor, support: Support, start: int, V: Tensor, U: Tensor) -> Float[Tensor, "rows d_out"]:
        """What one group's maps, number `start` and on, add at a support."""
        order, row, bounds = support.by_feature
        n = len(V)
        if x.device.type == "cpu":  # elsewhere, looking at the counts would be a wait
            first, last = int(bounds[start]), int(bounds[start + n])
            if runs_apart(last - first, len(x), n, V.shape[1]):
                counts = bounds[start : start + n + 1].diff().tolist()
                return _apart(x, gates.index_select(0, order[first:last]), row[first:last], counts, V, U)
        inside = (support.col >= start) & (support.col < start + n)
        place = torch.where(inside, support.row * n + support.col - start, len(x) * n)  # those of other groups go to a spare place
        spread = gates.new_zeros(len(x) * n + 1).index_put((place,), gates)
        return _together(x, spread[:-1].view(len(x), n), V, U)


def _together(x: Tensor, gates: Float[Tensor, "rows n"], V: Float[Tensor, "n r d_in"], U: Float[Tensor, "n r d_out"]) -> Tensor:
    """All maps of a group on every row."""
    latents = (x @ V.flatten(0, 1).T).unflatten(1, V.shape[:2]) * gates[:, :, None]
    return latents.flatten(1) @ U.flatten(0, 1)


def _apart(x: Tensor, gates: Float[Tensor, " active"], row: Int[Tensor, " active"], counts: list[int], V: Tensor, U: Tensor) -> Tensor:
    """Each map on the rows where it is active; `row` and `gates` are ordered by map, of which map t has counts[t]."""
    read = x.index_select(0, row).split(counts)
    written = torch.cat([part @ v.T @ u for part, v, u in zip(read, V.unbind(), U.unbind(), strict=True)])
    written = written * gates[:, None]
    return written.new_zeros(len(x), U.shape[2]).index_add(0, row, written)


@dataclass
class MapsCode(Code):
    """Codes whose components are maps: what they add depends on the rows `x` that were encoded."""

    x: Tensor
    coder: MapsCoder

    def decode(self, weight: Float[Tensor, "n one"]) -> Float[Tensor, "rows d"]:
        return self.coder.write(self.x, self.value, self.support)


class MapsCoder(SparseCoder):
    """One site's gate vectors and maps. A strength is the gate times its map's Frobenius norm, and the map counts as of norm one:
    a strength is then the length of what is written for white inputs of variance one, as in a dictionary."""

    def __init__(self, config: DictionaryConfig, groups: list[tuple[int, int]], d_in: int, d_out: int, generator: torch.Generator) -> None:
        super().__init__(config, d_in, d_out, False, generator)
        del self.W_dec
        self.maps = LowRankMaps(groups, d_in, d_out, generator)
        with torch.no_grad():  # rectified gates of these lengths add up to outputs of variance one
            self.W_enc.mul_((2 / config.features) ** 0.5 / ENCODER_SCALE)
        if isinstance(self.activation, JumpReLU):
            self.activation = SizedJumpReLU(config, config.features, self.b_enc)

    @property
    def lengths(self) -> Float[Tensor, " n"]:
        """Frobenius norms of the maps."""
        return self.maps.lengths()

    def decoder(self) -> Float[Tensor, "n one"]:
        """A column that penalties are weighted by: strengths hold a map's norm already, counts take it with its gate vector's."""
        if self.activation.config.sparsity == "l0":
            return (self.W_enc.norm(dim=1) * self.lengths)[:, None]
        return self.W_enc.new_ones(len(self.W_enc), 1)

    def code_at(self, x: Float[Tensor, "rows d"], entries: Float[Tensor, " active"] | None, support: Support | None) -> Code:
        code = super().code_at(x, entries, support)
        return MapsCode(code.pre, code.value, code.support, x, self)

    def write(self, x: Float[Tensor, "rows d"], strengths: Tensor, support: Support | None) -> Float[Tensor, "rows d_out"]:
        """What maps add, in normalised coordinates; `strengths` are dense, or a support's entries."""
        scale = 1 / self.lengths
        return self.maps(x, strengths * (scale if support is None else scale.index_select(0, support.col)), support)

    def revival(self, x: Float[Tensor, "rows d"], residual: Float[Tensor, "rows out"], k: int) -> Tensor:
        """As a dictionary's, of dead maps."""
        ids = self.dead_ids
        pre = self.pre_of(x, ids)
        whole = pre.new_zeros(len(x), len(self.dead)).index_copy(1, ids, pre)
        best = pre.topk(min(k, len(ids)), dim=1, sorted=False).indices
        support = support_of(torch.zeros_like(whole, dtype=torch.bool).scatter_(1, ids[best], True))
        error = (self.write(x, whole.flatten().index_select(0, support.index), support) - residual).square().sum()
        return min(1.0, len(ids) / k) * error / residual.square().sum().clamp(min=1e-20)


class SizedJumpReLU(JumpReLU):
    """JumpReLU whose L0 penalty counts each active map times its size: the norms of U_t V_t and of its gate vector, so that it
    cannot be avoided by moving length from one to the other."""

    def penalty(self, code: Code, decoder: Float[Tensor, "n one"]) -> Tensor:
        if self.config.sparsity != "l0":
            return super().penalty(code, decoder)
        log_threshold = self._log_threshold(code.pre, None if code.support is None else code.support.col)
        active: Tensor = _Step.apply(code.pre, log_threshold, self.config.bandwidth, self.config.ste_to_input)  # type: ignore[assignment]
        return self.config.l0 * of_lengths(code, active, decoder).sum() / code.rows
