"""From one replaced pass to sums per row: the quantities that the catalogue's metrics are functions of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decomp_bench.data.statistics import OutputStatistics
from decomp_bench.data.streams import positions
from decomp_bench.decomposer import Batch, Decomposer, Site
from decomp_bench.replacement import Replaced, ablated, unit_of

RowSums = dict[tuple[str, str], Tensor]
"""(quantity, part) -> [B], one sum for each row."""


@dataclass
class Scored:
    """A batch with what every condition needs of it: scored positions, scored next tokens, clean log-probabilities."""

    batch: Batch
    kept: Bool[Tensor, "*rows"]
    """Positions whose replacement counts, first one cut off for language models."""
    next_kept: Bool[Tensor, "B T2"] | None
    clean_logp: Float[Tensor, "B T2 vocab"] | None

    @cached_property
    def clean_p(self) -> Float[Tensor, "B T2 vocab"]:
        """Clean probabilities, computed once for all conditions."""
        assert self.clean_logp is not None
        return self.clean_logp.exp()

    @cached_property
    def clean_best(self) -> Int[Tensor, "B T2"]:
        """The clean model's most likely next token."""
        assert self.clean_logp is not None
        return self.clean_logp.argmax(-1)

    @staticmethod
    def of(batch: Batch, is_lm: bool) -> Scored:
        """Positions 1 to the last are scored for codes and outputs; those with a real next token for cross-entropy."""
        kept = positions(batch, is_lm)
        if not is_lm:
            return Scored(batch, kept, None, None)
        assert batch.logits is not None
        return Scored(batch, kept[:, 1:], kept[:, 2:], log_probabilities(batch.logits))


Piece = tuple[slice, slice]
_EVERYTHING: Piece = (slice(None), slice(None))


def log_probabilities(logits: Float[Tensor, "B T vocab"], piece: Piece = _EVERYTHING) -> Float[Tensor, "b t vocab"]:
    """Log-softmax in fp32 at positions 1 to T - 2, those that are scored and have a next token; of a piece of them where one is given."""
    return torch.log_softmax(logits[:, 1:-1][piece].float(), -1)


def _pieces(logits: Float[Tensor, "B T vocab"]) -> Iterator[Piece]:
    """Rows and scored positions few at a time on a CPU, so that what is computed of them stays in its cache; all at once elsewhere."""
    if logits.device.type != "cpu":
        yield _EVERYTHING
        return
    size = max(1, (1 << 17) // logits.shape[2])
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1] - 2, size):
            yield slice(row, row + 1), slice(start, min(start + size, logits.shape[1] - 2))


def _following(batch: Batch) -> Int[Tensor, "B T2 1"]:
    """The next token at every position that is scored."""
    assert batch.x is not None
    return batch.x[:, 2:, None]


def base_sums(scored: Scored) -> RowSums:
    """Quantities of the clean pass: tokens, targets, clean cross-entropy."""
    sums: RowSums = {("tokens", "all"): _rows(scored.kept.double())}
    if scored.clean_logp is not None and scored.next_kept is not None:
        sums["targets", "all"] = _rows(scored.next_kept.double())
        sums["ce_clean", "all"] = _rows(_cross_entropy(scored, scored.clean_logp))
    return sums


def behaviour_sums(scored: Scored, logits: Tensor, part: str) -> RowSums:
    """Cross-entropy, KL and top-1 agreement of a replaced output; squared error for a toy."""
    batch = scored.batch
    assert batch.logits is not None
    if scored.clean_logp is None or scored.next_kept is None:
        return {("output_error", part): (logits - batch.logits).double().square().flatten(1).mean(1)}
    kl, nll, same = (torch.empty_like(scored.clean_logp[..., 0]) for _ in range(3))
    for piece in _pieces(logits):
        logp, clean = log_probabilities(logits, piece), scored.clean_logp[piece]
        nll[piece] = -logp.gather(-1, _following(batch)[piece]).squeeze(-1)
        same[piece] = (logp.gather(-1, scored.clean_best[piece].unsqueeze(-1)).squeeze(-1) == logp.amax(-1)).to(same.dtype)
        kl[piece] = torch.linalg.vecdot(torch.sub(clean, logp, out=logp), scored.clean_p[piece])
    return {(name, part): _rows(value.double() * scored.next_kept) for name, value in (("ce", nll), ("kl", kl), ("agreement", same))}


def ablation_sums(scored: Scored, target, constants: dict[int, Tensor], name: str, part: str) -> RowSums:
    """Cross-entropy with MLP outputs held at constants, as quantity `name`; nothing for a toy."""
    if scored.clean_logp is None:
        return {}
    return {(name, part): _rows(_cross_entropy(scored, log_probabilities(ablated(target, scored.batch, constants))))}


def output_sums(scored: Scored, out: Replaced, statistics: OutputStatistics, first: int) -> RowSums:
    """Squared errors of each replaced MLP's output against the clean one, with the denominators of FVU and norm-MSE."""
    sums: RowSums = {}
    for layer, value in out.outputs.items():
        clean = scored.batch.clean[f"{layer}.mlp.out"]
        clean = (clean[:, 1:] if first else clean).double()
        error = (clean - value.double()).square().sum(-1) * scored.kept
        variance = (clean - statistics.mean[layer]).square().sum(-1) * scored.kept
        usual = clean.norm(dim=-1) <= statistics.largest[layer]
        part = str(layer)
        sums |= {
            ("error", part): _rows(error),
            ("variance", part): _rows(variance),
            ("power", part): _rows(clean.square().sum(-1) * scored.kept),
            ("error_trimmed", part): _rows(error * usual),
            ("variance_trimmed", part): _rows(variance * usual),
        }
    return sums


@dataclass
class Activity:
    """How one site's codes are used in one pass: at each scored position the active components, the scalars in their vectors and the
    numbers that pass through them, and for each component how often it fired and the sum of its absolute values."""

    count: Float[Tensor, "*rows"]
    scalars: Float[Tensor, "*rows"]
    coefficients: Float[Tensor, "*rows"]
    fired: Float[Tensor, " n"]
    mass: Float[Tensor, " n"]


def activity(scored: Scored, out: Replaced, decomposer: Decomposer, sites: list[Site]) -> dict[str, Activity]:
    """Activity of each site, in fp32 products, which count exactly: a batch has fewer than 2^24 positions."""
    found, kept = {}, scored.kept.float()
    for site in sites:
        codes = out.codes[site.name]
        active = codes.active.float()
        count = active.sum(-1) * kept
        scalars, coefficients = (
            count.double() * each if isinstance(each, int) else (active @ each.float().to(active.device)) * kept
            for each in (decomposer.component_sizes(site), decomposer.component_coefficients(site))
        )
        fired, mass = (kept.flatten() @ value.flatten(0, -2) for value in (active, codes.value.float().abs()))
        found[site.name] = Activity(count, scalars, coefficients, fired, mass)
    return found


def code_sums(found: dict[str, Activity]) -> RowSums:
    """Active components of each site, the scalars in their vectors, and the numbers that pass through them."""
    sums: RowSums = {}
    for name, one in found.items():
        counted = {"active": one.count, "active_scalars": one.scalars, "active_coefficients": one.coefficients}
        sums |= {(quantity, name): _rows(value.double()) for quantity, value in counted.items()}
    return sums


class Liveness:
    """Component counts over the whole evaluation: firing, activation mass, and the histogram of active components per token."""

    def __init__(self) -> None:
        self.fired: dict[str, Tensor] = {}
        self.mass: dict[str, Tensor] = {}
        self.histogram = torch.zeros(1, dtype=torch.float64)
        self.tokens = 0

    def add(self, scored: Scored, found: dict[str, Activity], decomposer: Decomposer, sites: list[Site]) -> None:
        """Take in one pass."""
        a_token: Tensor | None = None
        for site in sites:
            one = found[site.name]
            self.fired[site.name] = self.fired.get(site.name, 0) + one.fired.double().cpu()
            self.mass[site.name] = self.mass.get(site.name, 0) + one.mass.double().cpu() * write_norms(decomposer, site)
            if unit_of(site.slots[0].write).endswith("mlp"):
                a_token = one.count if a_token is None else a_token + one.count
        self.tokens += int(scored.kept.sum())
        if a_token is not None:
            counts = torch.bincount(a_token[scored.kept].long().cpu()).double()
            size = max(len(counts), len(self.histogram))
            self.histogram = _padded(self.histogram, size) + _padded(counts, size)

    def sums(self, mlps: float, dense: float) -> dict[tuple[str, str], float]:
        """The quantities behind the liveness metrics."""
        found: dict[tuple[str, str], float] = {}
        for name, fired in self.fired.items():
            mass = self.mass[name]
            found |= {
                ("fired", name): float((fired > 0).sum()),
                ("silent", name): float((fired == 0).sum()),
                ("dense", name): float((fired > dense * self.tokens).sum()),
                ("effective", name): float(mass.sum() ** 2 / mass.square().sum().clamp_min(1e-300)),
            }
        share = self.histogram.cumsum(0) / self.histogram.sum().clamp_min(1)
        if self.histogram.sum() > 0:
            found["l0_median", "all"] = int((share < 0.5).sum()) / mlps
            found["l0_p95", "all"] = int((share < 0.95).sum()) / mlps
        return found


def write_norms(decomposer: Decomposer, site: Site) -> Tensor:
    """Norm of each component's write vectors over all its slots [n]; ones where components have no directions."""
    found = [decomposer.directions(site, slot) for slot in site.slots]
    if any(pair is None for pair in found):
        return torch.ones(site.n, dtype=torch.float64)
    return torch.stack([pair[1].detach().double().cpu().square().sum(-1) for pair in found if pair is not None]).sum(0).sqrt()


def _cross_entropy(scored: Scored, logp: Tensor) -> Tensor:
    assert scored.next_kept is not None
    nll = -logp.gather(-1, _following(scored.batch)).squeeze(-1)
    return nll.double() * scored.next_kept


def _rows(value: Tensor) -> Tensor:
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def _padded(value: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, size - len(value)))
