"""What a decomposition recovers of a toy's known mechanisms: quantities that the catalogue's recovery metrics show.

Components are compared in the coordinates of the features: on the feature side by their products with what each feature alone causes
there, on the other side as they are. Live components are those that fired on the scored rows and are at least a tenth as long as a
mechanism; where no mechanisms are known, as the longest component, in what is read later of their outputs. A null puts as many random
directions of the same lengths in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decomp_bench import matching
from decomp_bench.conditions import upstream
from decomp_bench.decomposer import Batch, Decomposer, Site, Slot
from decomp_bench.metrics.recovery import METRICS, SUMMED
from decomp_bench.replacement import clean_codes, clean_points, replaced
from decomp_bench.targets.toys.truth import Hop, Mechanisms, Truth

KEYS = {metric.key for metric in METRICS}
Quantities = dict[tuple[str, str], float]
LIVE = 0.1
"""Length of a live component, relative to the mean mechanism (to the longest component, where mechanisms are not known)."""
NULLS, SEED, ROWS = 5, 0, 2048
"""Random sets behind a null, their seed, and drawn rows behind what is measured on data."""
DETECTS = 0.4
"""F1 that a parent's component must reach for absorption to mean anything (SAEBench)."""


@torch.no_grad()
def recovered(decomposer: Decomposer, fired: Mapping[str, Tensor]) -> Quantities:
    """(quantity, site, layer or all) -> value; NaN for `all` where target or method has nothing to compare.

    `fired` counts for each site how often its components fired on the scored rows.
    """
    found: dict[str, dict[str, float]] = {key: {} for key in KEYS}
    toy = decomposer.target.toy
    if toy is not None and not decomposer.target.is_lm:
        for part, values in _measures(decomposer, toy.truth, fired):
            for key, value in values.items():
                if math.isfinite(value):
                    found[key][part] = value
    quantities: Quantities = {(key, part): value for key, parts in found.items() for part, value in parts.items()}
    return quantities | {(key, "all"): _whole(key, parts) for key, parts in found.items() if "all" not in parts}


def _whole(key: str, parts: dict[str, float]) -> float:
    if not parts:
        return math.nan
    return sum(parts.values()) / (1 if key in SUMMED else len(parts))


def _measures(decomposer: Decomposer, truth: Truth, fired: Mapping[str, Tensor]):
    """(site, layer or all, values) of everything that applies."""
    generator = torch.Generator().manual_seed(SEED)
    for site in decomposer.sites:
        part = known_part(decomposer, site, truth)
        if part is not None:
            yield site.name, _mechanisms(part, fired[site.name] > 0, truth.live.get(site.name), generator)
        elif site.name in truth.live:
            yield site.name, _counted(decomposer, site, fired[site.name] > 0, truth)
    soft = decomposer.at(mask="soft") if "mask" in decomposer.swept else decomposer
    importance = {name: codes.gate for name, codes in codes_of(soft, truth.probes).items()}
    for site in decomposer.sites:
        if site.name in truth.pattern:
            yield site.name, _importances(importance[site.name], truth, site.name, generator)
    if truth.readout is not None:
        for layer in decomposer.layers:
            yield str(layer), _contributions(decomposer, layer, generator)
    if truth.parent is not None:
        rows = _drawn(decomposer)
        for name, codes in codes_of(decomposer, rows).items():
            yield name, _absorption(codes.active, rows > 0, truth.parent)
    if truth.hop is not None and truth.hop.layer in decomposer.layers and upstream(decomposer):  # patched, gates are of that stream
        yield "all", _hop(decomposer, truth.hop)


def _drawn(decomposer: Decomposer) -> Tensor:
    toy = decomposer.target.toy
    assert toy is not None
    return toy.draw(ROWS, torch.Generator().manual_seed(SEED)).to(decomposer.target.device)


def codes_of(decomposer: Decomposer, x: Tensor):
    """Codes of every site on the clean activations of some rows of a toy."""
    clean, logits = decomposer.target.clean(x, clean_points(decomposer))
    return clean_codes(decomposer, Batch(x, None, None, clean, logits))


# ---- components against mechanisms


@dataclass(frozen=True)
class Part:
    """Components of one slot in the features' coordinates, and what is known there."""

    feature: Float[Tensor, "C f"]
    other: Float[Tensor, "C d"]
    true: Float[Tensor, "f d"]
    has_lengths: bool
    random: Callable[[torch.Generator], Part]

    @property
    def lengths(self) -> Float[Tensor, " C"]:
        """Lengths of the components as matrices."""
        return self.feature.norm(dim=1) * self.other.norm(dim=1) if self.has_lengths else torch.ones(len(self.other))

    def columns(self) -> tuple[Float[Tensor, "C f"], Float[Tensor, "C f"]]:
        """Cosine and ratio of lengths of each component's column for a feature with that feature's mechanism."""
        return matching.columns(self.feature, self.other, self.true)

    def whole(self) -> tuple[Float[Tensor, "C f"], Float[Tensor, "C f"]]:
        """Cosine and ratio of lengths of each whole component with each mechanism; for directions alone, cosines of directions."""
        cosine = matching.cosines(self.other, self.true)
        if not self.has_lengths:
            return cosine, torch.ones_like(cosine)
        share = self.feature / self.feature.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return share * cosine, self.lengths[:, None] / self.true.norm(dim=1).clamp_min(1e-30)


@dataclass(frozen=True)
class MatrixPart:
    """The same of components of any rank, each with a column [d] for every feature."""

    column: Float[Tensor, "C f d"]
    true: Float[Tensor, "f d"]
    random: Callable[[torch.Generator], MatrixPart]
    has_lengths = True

    @property
    def lengths(self) -> Float[Tensor, " C"]:
        """Lengths of the components as matrices."""
        return self.column.flatten(1).norm(dim=1)

    def _with_true(self) -> Float[Tensor, "C f"]:
        return torch.einsum("cfd,fd->cf", self.column, self.true / self.true.norm(dim=1, keepdim=True).clamp_min(1e-30))

    def columns(self) -> tuple[Float[Tensor, "C f"], Float[Tensor, "C f"]]:
        """As of rank-one components."""
        lengths = self.column.norm(dim=2)
        return self._with_true() / lengths.clamp_min(1e-30), lengths / self.true.norm(dim=1).clamp_min(1e-30)

    def whole(self) -> tuple[Float[Tensor, "C f"], Float[Tensor, "C f"]]:
        """As of rank-one components."""
        lengths = self.lengths[:, None]
        return self._with_true() / lengths.clamp_min(1e-30), lengths / self.true.norm(dim=1).clamp_min(1e-30)


def known_part(decomposer: Decomposer, site: Site, truth: Truth) -> Part | MatrixPart | None:
    """The slot of a site whose mechanisms are known, its own layer's where there are several; None where there is none."""
    slots = [slot for slot in site.slots if (slot.read, slot.write) in truth.mechanisms]
    if not slots:
        return None
    known, vectors = truth.mechanisms[slots[0].read, slots[0].write], decomposer.directions(site, slots[0])
    if vectors is not None:
        read, write = (value.detach().cpu().float() for value in vectors)
        return _part(read, write, known)
    matrices = decomposer.matrices(site, slots[0])
    return None if matrices is None or known.side is None else _matrix_part(matrices.detach().cpu().float(), known)


def _matrix_part(matrices: Float[Tensor, "C d_in d_out"], known: Mechanisms) -> MatrixPart:
    near = matrices if known.side == "read" else matrices.mT
    column = known.basis.cpu() @ near

    def random(generator: torch.Generator) -> MatrixPart:
        drawn = torch.randn(matrices.shape, generator=generator)
        norms = (matrices.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)).view(-1, 1, 1)
        return _matrix_part(drawn * norms, known)

    return MatrixPart(column, known.vectors.cpu(), random)


def _part(read: Tensor, write: Tensor, known: Mechanisms) -> Part:
    near, far = (write, read) if known.side == "write" else (read, write)
    feature = near @ known.basis.cpu().T if known.side else torch.ones(len(near), len(known.basis))

    def random(generator: torch.Generator) -> Part:
        pair = [torch.nn.functional.normalize(torch.randn(v.shape, generator=generator), dim=1) * v.norm(dim=1, keepdim=True)
                for v in (read, write)]  # fmt: skip
        return _part(pair[0], pair[1], known)

    return Part(feature, far, known.vectors.cpu(), known.side is not None, random)


def _mechanisms(part: Part | MatrixPart, fired: Bool[Tensor, " C"], expected: int | None, generator: torch.Generator) -> dict[str, float]:
    threshold = LIVE * float(part.true.norm(dim=1).mean()) if part.has_lengths else 0.0
    live = fired.cpu() & (part.lengths > threshold)
    values = _of_all(part) | _of_live(part, live)
    values |= {"live": float(live.sum())} | ({} if expected is None else {"live_surplus": float(live.sum()) - expected})
    nulls = [_of_all(one) | _of_live(one, live) for one in (part.random(generator) for _ in range(NULLS))]
    return values | {f"{key}_null": sum(null[key] for null in nulls) / NULLS for key in nulls[0] if f"{key}_null" in KEYS}


def _counted(decomposer: Decomposer, site: Site, fired: Bool[Tensor, " C"], truth: Truth) -> dict[str, float]:
    """Live components of a map that has a known number of them but no known mechanisms.

    Lengths are those of what is read later: most directions that a ResidMLP's W_out writes to are read by nothing, and components that
    do nothing come to hold what lies there, since only the sum has to be W.
    """
    slot = site.slots[0]
    pair, matrices, readers = decomposer.directions(site, slot), decomposer.matrices(site, slot), truth.read_later.get(site.name)

    def seen(outputs: Tensor) -> Tensor:
        return outputs if readers is None else outputs @ readers.to(outputs).T

    if pair is not None:
        lengths = pair[0].norm(dim=1) * seen(pair[1]).norm(dim=1)
    elif matrices is not None:
        lengths = seen(matrices).flatten(1).norm(dim=1)
    else:
        return {}
    live = float((fired.to(lengths.device) & (lengths > LIVE * lengths.max())).sum())
    return {"live": live, "live_surplus": live - truth.live[site.name]}


def _of_all(part: Part | MatrixPart) -> dict[str, float]:
    """The published measures, which take every component, live or not."""
    if not part.has_lengths:
        return {"mmcs": matching.mmcs(part.whole()[0]), "ml2r": math.nan, "ml2r_longest": math.nan}
    cosine, ratio = part.columns()
    return {"mmcs": matching.mmcs(cosine), "ml2r": matching.ml2r(cosine, ratio), "ml2r_longest": matching.ml2r_longest(cosine, ratio)}


def _of_live(part: Part | MatrixPart, live: Bool[Tensor, " C"]) -> dict[str, float]:
    cosine, ratio = (value[live] for value in part.whole())
    values = {f"recovery_{key}" if key in ("precision", "recall", "f1") else key: v for key, v in matching.recovery(cosine, ratio).items()}
    return values | {"matched_cosine": matching.matched_cosine(cosine)}


# ---- importances, neurons, hierarchies


def _importances(importance: Float[Tensor, "f C"], truth: Truth, name: str, generator: torch.Generator) -> dict[str, float]:
    """Errors of the importances on one feature at a time; the null shuffles them over features and components."""

    is_identity = truth.pattern[name] == "identity"

    def error(values: Tensor) -> float:
        return float(matching.identity_error(values) if is_identity else matching.dense_error(values, truth.live[name]))

    importance = importance.cpu()
    shuffled = [importance.flatten()[torch.randperm(importance.numel(), generator=generator)].view_as(importance) for _ in range(NULLS)]
    return {"ci_error": error(importance), "ci_error_null": sum(map(error, shuffled)) / NULLS}


def _contributions(decomposer: Decomposer, layer: int, generator: torch.Generator) -> dict[str, float]:
    """Correlation of a layer's neuron contributions, and its null: random vectors in the components' place."""
    parts = neuron_parts(decomposer, layer)
    if parts is None:
        return {}
    response, effect, *own = parts
    nulls = []
    for _ in range(NULLS):
        drawn = [torch.randn(v.shape, generator=generator) for v in own]
        nulls.append(matching.contribution_correlation(response, effect, *drawn))
    return {"contributions": matching.contribution_correlation(*parts), "contributions_null": sum(nulls) / NULLS}


def neuron_parts(decomposer: Decomposer, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """What `matching.contributions` takes, of a layer whose two maps are both decomposed into rank-one components; None elsewhere."""
    up, down = f"{layer}.mlp.up", f"{layer}.mlp.down"
    sites = {site.name: site for site in decomposer.sites}
    pairs = [decomposer.directions(sites[p], Slot(p, p)) if p in sites else None for p in (up, down)]
    target = decomposer.target
    if pairs[0] is None or pairs[1] is None or target.toy is None or target.toy.truth.readout is None:
        return None
    known, readout = target.toy.truth.mechanisms[up, up], target.toy.truth.readout.cpu()
    (read, neurons), (hidden, write) = ([value.detach().cpu().float() for value in pair] for pair in pairs)  # type: ignore[union-attr]
    effect = readout @ target.weight(down).cpu()
    return known.vectors.cpu(), effect, read @ known.basis.cpu().T, neurons, readout @ (write.T @ hidden)


def _absorption(active: Bool[Tensor, "rows C"], on: Bool[Tensor, "rows f"], parent: Tensor) -> dict[str, float]:
    """Mean over the parents that some component detects; the share of those that none detects is `undetected`."""
    active, on, parent = active.cpu(), on.cpu(), parent.cpu()
    parents = (parent < 0).nonzero().flatten().tolist()
    pairs = [matching.absorption(active, on[:, p], on[:, parent == p].any(1)) for p in parents]
    values = [value for value, f1 in pairs if f1 >= DETECTS]
    return {"absorption": sum(values) / len(values) if values else math.nan, "undetected": 1 - len(values) / len(pairs)}


# ---- the second hop


def _hop(decomposer: Decomposer, hop: Hop) -> dict[str, float]:
    """How the replacement answers to variables that are changed between the layers, against the target's own answer.

    R^2 of the change of the second layer's outputs when all variables are set to those of another row, and the edges implied where a
    variable is changed alone: those that move an output by more than half of what the target's weakest edge does.
    """
    half = _drawn(decomposer).chunk(2)
    point = f"{hop.layer}.resid"
    first, second = (decomposer.target.clean(x, {point}, logits=False)[0][point] @ hop.basis.T for x in half)
    change = second - first
    own, found = (_answers(decomposer, half[0], change, hop, with_it) for with_it in (False, True))
    missed, whole = (own[0] - found[0]).double().square().sum(), own[0].double().square().sum()
    strengths = [torch.stack([answer.abs().mean(0) for answer in answers[1:]]) for answers in (own, found)]
    implied = strengths[1] > 0.5 * strengths[0][hop.edges].min()
    right = float((implied & hop.edges).sum())
    precision = right / float(implied.sum()) if implied.any() else math.nan
    return {"hop_r2": 1 - float(missed / whole), "edge_precision": precision, "edge_recall": right / float(hop.edges.sum())}


def _answers(decomposer: Decomposer, x: Tensor, change: Tensor, hop: Hop, with_it: bool) -> list[Tensor]:
    """Changes of the outputs for all variables together, then for each alone; of the replacement, or of the target itself."""
    target = decomposer.target
    added: list[Tensor] = []

    def run() -> Tensor:
        batch = Batch(x, None, None, {}, None)
        out = replaced(decomposer, batch, decomposer.layers).logits if with_it else target(x)
        return out[:, hop.outputs]

    def patch(_module: torch.nn.Module, args: tuple) -> tuple:
        return (args[0] + added[-1], *args[1:])

    before = run()
    handle = target.part(str(hop.layer)).register_forward_pre_hook(patch)
    try:
        answers = []
        for variables in (slice(None), *(slice(i, i + 1) for i in range(change.shape[1]))):
            added.append(change[:, variables] @ hop.basis[variables])
            answers.append(run() - before)
    finally:
        handle.remove()
    return answers
