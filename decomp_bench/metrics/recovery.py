"""What is recovered of a toy's known mechanisms. Measured once for a decomposer, under its first condition; without interval.

Each value that chance could reach has its null beside it, `KEY_null`: as many random directions of the same lengths, or importances
shuffled. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable

from decomp_bench.metrics.base import Context, Metric, Sums, Values, parts

_NEEDS = "needs a toy whose mechanisms are known, and a decomposition that has this part"
_NULL = "null of the same measure: as many random directions of the same lengths (importances: shuffled)"
_NEAR_NOTHING = "junk, which is near no mechanism"
_PAIR = "cosine of whole rank-one matrices > 0.9 and |log length ratio| < 0.2, one to one"

SUMMED = {"merges", "splits", "spare", "live", "live_surplus", "ci_error", "ci_error_null"}
"""Counts: `all` is the sum over sites; of everything else it is the mean."""


def _given(key: str) -> Callable[[Sums, Context], Values]:
    def compute(sums: Sums, context: Context) -> Values:
        layers = {site.name: str(site.layer) for site in context.sites}
        return {(layers[part], part) if part in layers else (part, "all"): sums[key, part] for part in parts(sums, key)}

    return compute


def _known(key: str, title: str, direction: str, formula: str, source: str = "METRICS 4", control: str = "", blind: str = "") -> Metric:
    return Metric(key, title, "", direction, formula, source, _given(key), task="regression", control=control, needs=_NEEDS, blind=blind)


_PAPERS = "SPD (arXiv 2506.20790), APD (arXiv 2501.14926)"
_WITH_NULL = [
    _known(
        "mmcs",
        "Mean max cosine",
        "higher",
        "mean_j max_c cos(component c's column for feature j, true column), over all components; autoencoding: of directions",
        _PAPERS,
        "random directions of the same lengths are its null",
        "lengths, and in two dimensions whatever is found: read it beside mmcs_null",
    ),
    _known(
        "ml2r",
        "Mean L2 ratio",
        "none",
        "mean_j length of the column of the component of largest cosine / true length",
        _PAPERS,
        "planted truth gives 1; a tiny aligned component spoils it",
    ),
    _known(
        "ml2r_longest",
        "Mean L2 ratio of the longest",
        "none",
        "the same of the longest component among those with cosine > 0.99; 0 for a mechanism without one",
        "magnitude-aware form of ML2R",
        "planted truth gives 1",
    ),
    _known(
        "matched_cosine",
        "Matched cosine",
        "higher",
        "mean over mechanisms of the cosine of whole matrices in the best one-to-one assignment of live components",
        control="planted truth gives 1",
    ),
    _known(
        "recovery_precision",
        "Precision of components",
        "higher",
        f"live components that are a mechanism / live components; {_PAIR}",
        control="duplicates and junk lower it",
    ),
    _known(
        "recovery_recall",
        "Recall of mechanisms",
        "higher",
        f"mechanisms that are a live component / mechanisms; {_PAIR}",
        control="planted truth gives 1, junk 0",
    ),
    _known(
        "recovery_f1",
        "F1 of mechanisms",
        "higher",
        f"harmonic mean of precision and recall; {_PAIR}",
        control="planted truth gives 1, junk 0",
    ),
    _known(
        "ci_error",
        "Importance pattern error",
        "lower",
        "on one feature at a time (0.75): entries that differ by more than 0.1 from the identity (best order) or the dense pattern",
        "SPD main: IdentityCIError, DenseCIError",
        "planted truth gives 0",
    ),
    _known(
        "contributions",
        "Correlation of neuron contributions",
        "higher",
        "Pearson of (x_i -> neuron)(neuron -> y_i): the target's against the strongest component's of each feature",
        "SPD (arXiv 2506.20790), residual MLPs",
        "planted truth gives 1",
    ),
]
_PLAIN = [
    _known(
        "merges", "Merged components", "lower", "live components whose cosine with two mechanisms or more is > 0.5", blind=_NEAR_NOTHING
    ),
    _known(
        "splits", "Split mechanisms", "lower", "mechanisms whose cosine with two live components or more is > 0.5", blind=_NEAR_NOTHING
    ),
    _known("spare", "Spare live components", "lower", "live components that are no mechanism"),
    _known(
        "live",
        "Live components",
        "none",
        "components that fired and are longer than a tenth of the mean mechanism; where none are known, than a tenth of the longest "
        "component, in what is read later of their outputs",
        "SPD (counts)",
    ),
    _known("live_surplus", "Live components beyond the known number", "none", "live - known; negative: some are missing", "SPD (counts)"),
    _known(
        "absorption",
        "Absorption",
        "lower",
        "P(parent's component off | child on) - P(off | parent on, no child), mean over detected parents",
        "METRICS 11",
        "an honest detector gives 0, one that is off beside children 1",
        "junk that detects few parents and misses them at random (experiment 015): read it beside undetected",
    ),
    _known("undetected", "Undetected parents", "lower", "share of parents that no component detects with an F1 of 0.4", "METRICS 11"),
    _known(
        "hop_r2",
        "Response to patched variables",
        "higher",
        "R^2 of the outputs' change when what the first layer wrote is replaced by another row's, against the target's change",
        "METRICS 3.6",
        "the target gives 1, a second layer that does not read the stream 0",
    ),
    _known("edge_precision", "Precision of hop edges", "higher", "implied edges that are planted / implied edges", "METRICS 3.6"),
    _known(
        "edge_recall",
        "Recall of hop edges",
        "higher",
        "planted edges that are implied / planted edges",
        "METRICS 3.6",
        blind="junk that implies every edge: read it beside edge_precision",
    ),
]
METRICS = [*_WITH_NULL, *(_known(f"{m.key}_null", f"{m.title}, by chance", "none", _NULL, m.source) for m in _WITH_NULL), *_PLAIN]
