"""Found against true: how rank-one components and importances match known ones. Plain tensors, no model.

C components are compared with m true mechanisms. Matrices are [C, m] unless said otherwise; the cosine with a zero vector is 0.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CLOSE, NEAR = 0.9, 0.5
"""Cosines above which a component is a mechanism, and shares in one."""
LENGTH = 0.2
"""Largest |log ratio of lengths| between a component and the mechanism that it is."""
PARALLEL = 0.99
"""Cosine above which the magnitude-aware ratio takes the longest component."""


def cosines(found: Float[Tensor, "C d"], true: Float[Tensor, "m d"]) -> Float[Tensor, "C m"]:
    """Cosine of every found vector with every true one."""
    return _unit(found) @ _unit(true).T


def columns(feature: Float[Tensor, "C f"], other: Float[Tensor, "C d"], true: Float[Tensor, "f d"]
            ) -> tuple[Float[Tensor, "C f"], Float[Tensor, "C f"]]:  # fmt: skip
    """Cosine and ratio of lengths of each component's columns with the true ones.

    A component is the matrix feature[c] (x) other[c]: its column for feature j is feature[c, j] other[c], the true one is true[j].
    """
    cosine = feature.sign() * cosines(other, true)
    ratio = feature.abs() * other.norm(dim=1)[:, None] / true.norm(dim=1).clamp_min(1e-30)
    return cosine, ratio


def mmcs(cosine: Float[Tensor, "C m"]) -> float:
    """Mean over mechanisms of the largest cosine (SPD, APD: mean max cosine similarity)."""
    return float(cosine.amax(0).mean())


def ml2r(cosine: Float[Tensor, "C m"], ratio: Float[Tensor, "C m"]) -> float:
    """Mean over mechanisms of the ratio of lengths of the component of largest cosine (SPD, APD: mean L2 ratio).

    The cosine does not see lengths: a tiny component that happens to point along a mechanism may be the one that is measured.
    """
    return float(ratio.gather(0, cosine.argmax(0)[None]).mean())


def ml2r_longest(cosine: Float[Tensor, "C m"], ratio: Float[Tensor, "C m"]) -> float:
    """The same of the longest component among those whose cosine is above 0.99; 0 for a mechanism that has none."""
    return float(torch.where(cosine > PARALLEL, ratio, 0.0).amax(0).mean())


def matched_cosine(cosine: Float[Tensor, "C m"]) -> float:
    """Mean over mechanisms of the cosine in the best one-to-one assignment (Hungarian); 0 for a mechanism left without a component."""
    if not len(cosine):
        return 0.0
    rows, places = linear_sum_assignment(cosine.double().cpu().numpy(), maximize=True)
    return float(cosine[torch.from_numpy(rows), torch.from_numpy(places)].sum() / cosine.shape[1])


def recovery(cosine: Float[Tensor, "C m"], ratio: Float[Tensor, "C m"]) -> dict[str, float]:
    """How many mechanisms were found, by how many of the live components, which are the rows.

    A component is a mechanism where their cosine is above 0.9 and |log ratio of lengths| below 0.2; pairs are one to one, so that
    duplicates count against precision. `merges`: components that share (cosine above 0.5) in two mechanisms or more; `splits`: mechanisms
    that two components or more share in; `spare`: live components that are no mechanism.
    """
    found = (cosine > CLOSE) & (ratio.clamp_min(1e-30).log().abs() < LENGTH)
    pairs, shares = pairings(found), (cosine > NEAR)
    precision = pairs / len(cosine) if len(cosine) else 0.0
    recall = pairs / cosine.shape[1]
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if pairs else 0.0,
        "merges": float((shares.sum(1) >= 2).sum()),
        "splits": float((shares.sum(0) >= 2).sum()),
        "spare": float(len(cosine) - pairs),
    }


def pairings(allowed: Bool[Tensor, "C m"]) -> int:
    """The most pairs that can be made one to one."""
    if not allowed.numel():
        return 0
    rows, places = linear_sum_assignment(allowed.cpu().numpy(), maximize=True)
    return int(allowed[torch.from_numpy(rows), torch.from_numpy(places)].sum())


# ---- importances on inputs with one feature each, rows the features


def identity_error(importance: Float[Tensor, "f C"], tolerance: float = 0.1) -> int:
    """Entries that differ from the identity pattern under the best order of components (SPD main: identity CI error).

    Off the diagonal, surplus columns included, what is above the tolerance; on it what is below 1 - tolerance.
    """
    values = importance.double().cpu().numpy()
    rows, places = linear_sum_assignment(values, maximize=True)
    diagonal = values[rows, places]
    others = (values > tolerance).sum() - (diagonal > tolerance).sum()
    unpaired = max(0, values.shape[0] - values.shape[1])
    return int(others + (diagonal < 1 - tolerance).sum() + unpaired)


def dense_error(importance: Float[Tensor, "f C"], k: int, entries: int = 1, tolerance: float = 0.1) -> int:
    """Deviations from k columns in use (SPD main: dense CI error).

    Columns are ordered by their sums. Each of the first k lacks what it has fewer than `entries` values of at least 1 - tolerance; in all
    others every value above the tolerance counts.
    """
    values = importance.double().cpu().numpy()
    ordered = values[:, np.argsort(-values.sum(0), kind="stable")]
    lacking = np.maximum(0, entries - (ordered[:, :k] >= 1 - tolerance).sum(0)).sum()
    return int(lacking + (ordered[:, k:] > tolerance).sum())


# ---- neurons


def contribution_correlation(
    response: Float[Tensor, "f n"],
    effect: Float[Tensor, "f n"],
    feature: Float[Tensor, "C f"],
    neurons: Float[Tensor, "C n"],
    summed: Float[Tensor, "f n"],
) -> float:
    """Pearson correlation of neuron contributions: the target's against those of one component for each feature.

    A neuron's contribution is what it adds to a feature's own output when the feature is on: its response times its effect (SPD).
    Component c of the map into the neurons responds with feature[c, i] neurons[c]; `summed` is the effect of all components of the map out
    of them together. For each feature the component with the largest single contribution stands.
    """
    return float(torch.corrcoef(contributions(response, effect, feature, neurons, summed).double())[0, 1])


def contributions(
    response: Float[Tensor, "f n"],
    effect: Float[Tensor, "f n"],
    feature: Float[Tensor, "C f"],
    neurons: Float[Tensor, "C n"],
    summed: Float[Tensor, "f n"],
) -> Float[Tensor, "2 f*n"]:
    """What is correlated there: the target's contributions, and those of the component that stands for each feature."""
    each = feature.T[:, :, None] * neurons * summed[:, None]
    best = each[torch.arange(len(each)), each.amax(2).argmax(1)]
    return torch.stack([(response * effect).flatten(), best.flatten()])


# ---- hierarchies


def absorption(active: Bool[Tensor, "rows C"], parent: Bool[Tensor, " rows"], child: Bool[Tensor, " rows"]) -> tuple[float, float]:
    """How often the component of a parent feature fails when a child is on, beyond how often it fails anyway; and its F1 as a detector.

    The component is the one of best F1 on the rows without a child. Absorption = P(off | child on) - P(off | parent on, no child).
    """
    plain = ~child
    on, truth = active[plain].double(), parent[plain].double()
    hits = truth @ on
    f1 = 2 * hits / (on.sum(0) + truth.sum()).clamp_min(1)
    best = int(f1.argmax())
    beside, alone = (float((~active[rows, best]).double().mean()) for rows in (parent & child, parent & plain))
    return beside - alone, float(f1[best])


def _unit(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    norms = vectors.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, vectors / norms.clamp_min(1e-30), 0.0)
