"""Components of topk and batchtopk coders divided over processes: each holds and trains a slice of every site's.

Every process reads the same rows. A selection is over the components of all processes: each offers its largest pre-activations, and keeps
those that are among the largest of all offers. What components add up to is summed over processes, so that every process has the loss of
the whole and, without further communication, the gradients of its slice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.decomposer import Choice
from decomp_bench.errors import UserError

from ._activations import Code
from ._calibration import StrengthCounts
from ._coder import SparseCoder
from ._dictionary import Dictionary
from ._sparse import Support, top_of_batch
from ._topk import BatchTopK, TopK

SLICED = ("W_enc", "b_enc", "W_dec")


class Shards:
    """The processes of a group, each with a slice of n components of every site."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.count = group, dist.get_rank(group), dist.get_world_size(group)

    def part(self, n: int) -> slice:
        """This process' components of n; raises UserError where they do not divide."""
        if n % self.count:
            raise UserError(f"method.features={n} does not divide over {self.count} processes; make it a multiple of {self.count}")
        return slice(self.rank * n // self.count, (self.rank + 1) * n // self.count)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes; its gradient goes to each process' term as it is."""
        return _Sum.apply(value, self.group)  # type: ignore[return-value]

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes of numbers that need no gradient."""
        value = value.detach().clone()
        dist.all_reduce(value, group=self.group)
        return value

    def gathered(self, value: Tensor) -> list[Tensor]:
        """Every process' tensor of this shape."""
        parts = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return parts

    def best(self, offers: Float[Tensor, "*rows m"], k: int) -> Tensor:
        """Which of this process' offers, -inf for none, are among the k largest of all processes' in their row: a mask."""
        every = torch.cat(self.gathered(offers), -1)
        index = every.topk(min(k, every.shape[-1]), -1, sorted=False).indices
        chosen = torch.zeros_like(every, dtype=torch.bool).scatter_(-1, index, True)
        m = offers.shape[-1]
        return chosen[..., self.rank * m : (self.rank + 1) * m] & offers.isfinite()

    def top_of_rows(self, pre: Float[Tensor, "*rows n"], k: int) -> Tensor:
        """Which entries are among the k largest of their whole row: a mask."""
        offers, index = pre.detach().topk(min(k, pre.shape[-1]), -1)
        return torch.zeros_like(pre, dtype=torch.bool).scatter_(-1, index, self.best(offers, k))

    def top_of_batch(self, pre: Float[Tensor, "rows n"], count: int) -> Support:
        """The `count` largest positive entries of the whole matrix, those of this process."""
        own = top_of_batch(pre, count)
        offers = pre.new_full((count,), -torch.inf)
        offers[: len(own.index)] = pre.flatten().index_select(0, own.index)
        return Support(len(pre), pre.shape[1], own.index[self.best(offers, count)[: len(own.index)]])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class ShardedTopK(TopK):
    """TopK whose rows are divided over processes."""

    shards: Shards
    by_rows = False  # one exchange between processes, not one for each part

    def gate(self, pre: Float[Tensor, "*rows n"], choice: Choice) -> Float[Tensor, "*rows n"]:
        return (self.shards.top_of_rows(pre, choice.k or self.config.k) & (pre > 0)).to(pre.dtype)

    def support(self, pre: Float[Tensor, "rows n"], k: int | None = None) -> Support:
        mask = self.shards.top_of_rows(pre, k or self.k) & (pre > 0)
        return Support(len(pre), pre.shape[1], mask.flatten().nonzero().squeeze(1))

    def training_gate(self, pre: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        return self.support(pre.detach().flatten(0, -2)).gate().view(pre.shape).to(pre.dtype) * (pre > 0)


class ShardedBatchTopK(BatchTopK):
    """BatchTopK whose batches' selections, running thresholds and calibration are those of all processes together."""

    shards: Shards

    training_gate = ShardedTopK.training_gate

    def support(self, pre: Float[Tensor, "rows n"], k: int | None = None) -> Support:
        return self.shards.top_of_batch(pre, (k or self.k) * len(pre))

    @torch.no_grad()
    def observe(self, values: Float[Tensor, "*shape"]) -> None:
        smallest = values.detach().min() if values.numel() else values.new_tensor(torch.inf)
        super().observe(torch.stack(self.shards.gathered(smallest)).min()[None])

    def calibrate(self, counts: StrengthCounts) -> None:
        counts.counts = self.shards.total(counts.counts)
        super().calibrate(counts)


KINDS: dict[str, type[ShardedTopK] | type[ShardedBatchTopK]] = {"topk": ShardedTopK, "batchtopk": ShardedBatchTopK}


class ShardedCoder(SparseCoder):
    """This process' slice of a coder."""

    def __init__(self, whole: SparseCoder, shards: Shards) -> None:
        nn.Module.__init__(self)
        part, config = shards.part(len(whole.W_enc)), whole.activation.config
        self.shards, self.normalise, self.W_skip, self.free = shards, whole.normalise, whole.W_skip, whole.free
        for name in SLICED:
            setattr(self, name, nn.Parameter(getattr(whole, name).detach()[part].clone()))
        for name in ("idle", "dead"):
            self.register_buffer(name, getattr(whole, name)[part].clone(), persistent=False)
        self.activation = KINDS[config.activation](config, config.features, self.b_enc)
        self.activation.load_state_dict(whole.activation.state_dict())
        self.activation.shards = shards
        self._dead_ids = None

    @property
    def dead_everywhere(self) -> int:
        return int(self.shards.total(self.dead.sum()))

    def watch(self, code: Code, seen: Float[Tensor, "*shape"]) -> Tensor:
        return self.shards.total(super().watch(code, seen))

    def revival(self, x: Float[Tensor, "rows d"], residual: Float[Tensor, "rows out"], k: int) -> Tensor:
        ids, dead = self.dead_ids, self.dead_everywhere
        pre, most = self.pre_of(x, ids), int(torch.stack(self.shards.gathered(self.dead.sum())).max())
        offers = torch.nn.functional.pad(pre.detach(), (0, most - len(ids)), value=-torch.inf)
        chosen = self.shards.best(offers, k)[:, : len(ids)]
        error = (self.shards.sum((pre * chosen) @ self.decoder()[ids]) - residual).square().sum()
        return min(1.0, dead / k) * error / residual.square().sum().clamp(min=1e-20)


def shard(decomposer: Dictionary, group: dist.ProcessGroup | None = None) -> None:
    """Keep this process' slice of every site of a decomposer that all processes built alike; raises UserError for what has no slices."""
    config, shards = decomposer.config, Shards(group)
    plain = all(type(coder) is SparseCoder for coder in decomposer.coders.values())
    local = decomposer.trains_on == "activations" and not config.stochastic
    if config.activation not in KINDS or not plain or not local or decomposer.across_layers or config.revive == "resample":
        known = f"{' or '.join(KINDS)}, whole decoders, own thresholds, a local loss, and neither resampling nor stochastic"
        raise UserError(f"only coders with {known} divide over processes")
    decomposer.shards = shards
    for place, site in enumerate(decomposer.sites):
        made = ShardedCoder(decomposer.coder(site), shards)
        decomposer.coders[site.name] = made
        decomposer.sites[place] = replace(site, n=len(made.W_enc))


@torch.no_grad()
def clip(decomposer: Dictionary, limit: float) -> None:
    """Clip each parameter group to a gradient norm over all processes; what every process has is counted once."""
    sliced = {getattr(coder, name) for coder in decomposer.coders.values() for name in SLICED}
    assert decomposer.shards is not None
    for group in decomposer.parameter_groups():
        grads = [(p in sliced, p.grad) for p in group["params"] if p.grad is not None]
        zero = torch.zeros((), device=decomposer.target.device)
        shared, own = (sum((g.square().sum() for is_sliced, g in grads if is_sliced == kind), zero) for kind in (False, True))
        norm = (shared + decomposer.shards.total(own)).sqrt()
        for _, grad in grads:
            grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))


def whole_state(decomposer: Dictionary) -> dict[str, Tensor]:
    """The state dict of the decomposer that is not divided, the same in every process."""
    assert decomposer.shards is not None
    state = decomposer.state_dict()
    return {name: torch.cat(decomposer.shards.gathered(v)) if name.rsplit(".", 1)[-1] in SLICED else v for name, v in state.items()}
