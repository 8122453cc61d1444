"""What is drawn and tabled of robustness: errors along constant sources, along an adversary's steps, and along donors; one row a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from decomp_bench.results import unfolded

from .measured import Measurements, ordered, read
from .points import tidy
from .tracks import Axis, tracks

KL, MSE = "robustness_kl", "robustness_mse"
MASS = ("mass_kl", "mass_mse")
SOURCES = "Masks g + (1 - g) r, g the gates of the clean pass; the dense remainder, where there is one, by r too."
TEXTS = {
    "constant": f"Error of the masked model with one source r everywhere. {SOURCES} r = 1 lets everything through.",
    "adversary": (
        "Error under sources that climb by the sign of its gradient, shared by all positions of a batch, from random ones (filled), and "
        f"under sources that take as many steps of random signs (lighter, hollow). {SOURCES}"
    ),
    "aggregation": (
        "Rise of the error when all components that are active at some other positions are turned on beside the gates (filled), and as "
        "many random components of like frequency (lighter, hollow)."
    ),
    "mass": (
        "Error of the model with every component on but, at each position, a growing random share of those that are inactive there "
        "(filled), or as many of any (lighter, hollow). Without the dense remainder."
    ),
}
TABLE = ("importance", "unmasked", "stochastic", "random", "dropped", "zero")


def _test(frame: pd.DataFrame, name: str) -> Measurements | None:
    """The points of one test, of which there may be none; of the controls that match, where there are several, those."""
    data = unfolded(tidy(frame))
    own = (data["test"] == name) & (data["concept"] == "all") & (data["way"] != "random uniform")
    return read(frame[own.to_numpy()], "at") if own.any() else None


def _error(found: Measurements, keys: tuple[str, str] = (KL, MSE)) -> Axis:
    is_lm = (found.data["metric"] == keys[0]).any()
    return Axis(keys[0], "KL (nats/token)", True) if is_lm else Axis(keys[1], "Mean squared error", True)


def _caption(found: Measurements, name: str) -> str:
    facts = found.facts
    missing = " Families that are not drawn close only what has no strength, where the test is trivial."
    return (
        f"{TEXTS[name]} Target {facts['target']} ({facts['target_hash'][:8]}), layers {facts['layers']}; {facts['dataset']} "
        f"(tokens {facts['token_hash'][:8]}). Protocol {facts['protocol']}, gates {facts['gates']}; {facts['n_documents']} documents. "
        f"Intervals: 95% bootstrap over documents; {facts['seeds']}.{missing}"
    )


def figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """One figure for each test that is not trivial for every family; raises ValueError with one line."""
    made = {}
    for name, x in (
        ("constant", Axis("at", "Source r")),
        ("adversary", Axis("at", "Steps of the adversary", True)),
        ("aggregation", Axis("at", "Positions whose components are on", True)),
    ):
        found = _test(frame, name)
        if found is not None:
            y = Axis("robustness_rise", "Rise of the error") if name == "aggregation" else _error(found)
            made[f"robustness_{name}"] = tracks(found, x, y, "documents", _caption(found, name), controls=name != "constant")
    return made


def table(frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    """One row for each family: the error under each mask, under the strongest adversary, and the error of the summed weights."""
    masks, attacked = _test(frame, "mask"), _test(frame, "adversary")
    if masks is None:
        return []
    metric = _error(masks).metric
    data = tidy(frame)
    weights = data[(data["metric"] == "weight_error") & (data["site"] == "all")].groupby("family")["value"].mean()
    rows = []
    for entry in ordered(masks.of(metric, "documents", at="zero")):
        row: dict[str, object] = {"family": entry[0]}
        for mask in TABLE:
            row[mask] = _number(masks.of(metric, "documents", at=mask), entry)
        steps = sorted(set(attacked.data["at"]), key=float) if attacked is not None else []
        for step in steps[:1] + steps[1:][-1:]:
            row[f"adversary at {step}"] = _number(attacked.of(metric, "documents", at=step), entry)  # type: ignore[union-attr]
        row["weight error"] = f"{weights[entry[0]]:.3g}" if pd.notna(weights.get(entry[0])) else "-"
        rows.append(row)
    return rows


def _number(points: pd.DataFrame, entry: tuple) -> str:
    return f"{points.loc[entry]['mean']:.3g}" if entry in points.index else "-"


# ---- growing sets of components switched off


def mass_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """The error along the share of inactive components that are off; none where the test is trivial for every family."""
    found = _test(frame, "mass")
    if found is None:
        return {}
    x = Axis("at", "Share of the inactive that is off")
    return {"mass_ablation": tracks(found, x, _error(found, MASS), "documents", _caption(found, "mass"), controls=True)}


def mass_table(frame: pd.DataFrame) -> Sequence[Mapping[str, object]]:
    """One row for each family: the error by the share that is off, and with as many of any component off at half."""
    found = _test(frame, "mass")
    if found is None:
        return []
    metric = _error(found, MASS).metric
    shares = sorted(set(found.data["at"]), key=float)
    rows = []
    for entry in ordered(found.of(metric, "documents", at=shares[-1])):
        cells = {f"off {share}": _number(found.of(metric, "documents", at=share), entry) for share in shares}
        controls = found.of(metric, "documents", control=True, at=shares[len(shares) // 2])
        rows.append({"family": entry[0], **cells, f"any off {shares[len(shares) // 2]}": _number(controls, entry)})
    return rows
