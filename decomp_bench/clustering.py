"""Components that are active together, merged into groups as long as that shortens the description of which are active.

A group is active where any of its members is. The description length of some positions is the sum over groups of s (log2 k + alpha r), with
s the number of positions where the group is active, r its members and k the number of groups: naming an active group costs log2 k bits, and
having it active costs what it contains. Pairs are merged greedily, the cheapest first, until every merge would cost (SPD's and VPD's
post-processing, which draws among the cheapest pairs instead; Bushnaq et al. 2025, 2026).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from decomp_bench.data.sources import Source
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Decomposer
from decomp_bench.errors import UserError
from decomp_bench.replacement import clean_codes, clean_rows
from decomp_bench.robustness import soft

BATCH = 16
Name = tuple[str, int]
"""Site and index of a component."""


@dataclass
class Groups:
    """Where each group is active [positions, k], at how many positions each two are together [k, k], and the members of each."""

    active: Bool[Tensor, "positions k"]
    together: Float[Tensor, "k k"]
    members: list[list[int]]

    @staticmethod
    def of(active: Bool[Tensor, "positions k"]) -> Groups:
        """Every component by itself."""
        dense = active.float()
        return Groups(active, (dense.T @ dense).double(), [[i] for i in range(active.shape[1])])

    @property
    def sizes(self) -> Float[Tensor, " k"]:
        """Members of each group."""
        return torch.tensor([len(one) for one in self.members], dtype=torch.double)

    def length(self, alpha: float) -> float:
        """Description length in bits."""
        return float((self.together.diagonal() * (np.log2(len(self.members)) + alpha * self.sizes)).sum())

    def costs(self, alpha: float) -> Float[Tensor, "k k"]:
        """Change of the description length by merging each two groups; the diagonal means nothing."""
        s, r, k = self.together.diagonal(), self.sizes, len(self.members)
        either = s[:, None] + s - self.together
        fewer = (s.sum() - s[:, None] - s) * np.log2((k - 1) / k) + either * np.log2(k - 1) - (s[:, None] + s) * np.log2(k)
        return fewer + alpha * (either * (r[:, None] + r) - (s * r)[:, None] - s * r)

    def merged(self, i: int, j: int) -> Groups:
        """With two groups as one, in the place of the first."""
        i, j = min(i, j), max(i, j)
        rest = torch.tensor([place for place in range(len(self.members)) if place != j])
        active = self.active[:, rest]
        active[:, i] = self.active[:, i] | self.active[:, j]
        row = (active[:, i].float() @ active.float()).double()
        together = self.together[rest][:, rest]
        together[i], together[:, i] = row, row
        members = [self.members[place] for place in rest.tolist()]
        members[i] = sorted(self.members[i] + self.members[j])
        return Groups(active, together, members)


def clustered(active: Bool[Tensor, "positions n"], alpha: float = 1.0, progress: Callable[[int, int], None] | None = None) -> Groups:
    """Merge greedily until no merge shortens the description."""
    groups = Groups.of(active)
    start = len(groups.members)
    while len(groups.members) > 1:
        if progress:
            progress(start - len(groups.members), start)
        costs = groups.costs(alpha).fill_diagonal_(torch.inf)
        i, j = divmod(int(costs.argmin()), len(groups.members))
        if float(costs[i, j]) >= 0:
            break
        groups = groups.merged(i, j)
    return groups


@torch.no_grad()
def activity(decomposer: Decomposer, source: Source, tokens: int, threshold: float = 0.01, split: str = "test"
             ) -> tuple[Bool[Tensor, "positions n"], list[Name]]:  # fmt: skip
    """Where components have a gate above a threshold, at the first tokens of a split, of those of all sites that ever have; and which
    those are. Raises UserError where there is none."""
    view, rows, size = soft(decomposer), source.evaluation_rows(split, tokens), BATCH * source.rows_a_sequence
    parts: list[Tensor] = []
    for start in range(0, rows, size):
        batch = with_clean(source, source.batch(split, np.arange(start, min(rows, start + size))), view.points(), logits=False)
        kept = clean_rows(view, positions(batch, view.target.keeps_first))
        codes = clean_codes(view, batch)
        parts.append(torch.cat([codes[site.name].gate[kept] > threshold for site in view.sites], 1).cpu())
    found = torch.cat(parts)
    alive = found.any(0)
    if not bool(alive.any()):
        raise UserError(f"no gate is above {threshold:g} at {len(found):,} positions: lower --threshold or take more --tokens")
    names = [(site.name, index) for site in view.sites for index in range(site.n)]
    return found[:, alive], [name for name, on in zip(names, alive.tolist(), strict=True) if on]


def cluster(
    decomposer: Decomposer, source: Source, tokens: int = 4096, alpha: float = 1.0, threshold: float = 0.01, split: str = "test",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Clusters of a decomposition's components over all sites, largest first, each with its members (`site#index`) and the share of
    positions where it is active; and the description length before and after, in bits a position."""
    active, names = activity(decomposer, source, tokens, threshold, split)
    before, found = Groups.of(active).length(alpha), clustered(active, alpha, progress)
    share = found.active.double().mean(0).tolist()
    groups = [
        {"members": [f"{names[i][0]}#{names[i][1]}" for i in members], "density": density}
        for members, density in zip(found.members, share, strict=True)
    ]
    about = {"positions": len(active), "components": len(names), "alpha": alpha, "threshold": threshold}
    bits = {"bits_before": before / len(active), "bits_after": found.length(alpha) / len(active)}
    return about | bits | {"clusters": sorted(groups, key=lambda one: -len(one["members"]))}


# ---- two clusterings of the same components, as labels


def pairs_apart(first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> int:
    """Pairs of components that one clustering has together and the other apart."""
    differ = (first[:, None] == first) != (second[:, None] == second)
    return int(differ.sum()) // 2


def misplaced(first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> int:
    """Components that are in another group under the best one-to-one naming of groups (permutation-invariant Hamming distance)."""
    counts = np.zeros((int(first.max()) + 1, int(second.max()) + 1))
    np.add.at(counts, (first.numpy(), second.numpy()), 1)
    return len(first) - int(counts[linear_sum_assignment(counts, maximize=True)].sum())
