"""From results rows to the points of curves: one selection and one mean over seeds for every figure and table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from decomp_bench.results import COLUMNS

from .intervals import over_seeds, together

PROTOCOLS = ("cascading", "clean", "single")
GATES = ("clean", "self")
COMPARABLE = ("target", "target_hash", "dataset", "token_hash", "positions")  # rows that differ here never share axes
RUN = ["run_id", "family", "kind", "trainable", "variant", "curve", "seed", "protocol", "gates"]
CURVE = ["protocol", "gates", "family", "kind", "trainable", "curve", "origin"]


@dataclass(frozen=True)
class View:
    """Which rows share the axes: two metrics under the same conditions. `gates` lists what is drawn where the rows have it."""

    x: str = "active_params"
    y: str = "ce_delta"
    protocols: tuple[str, ...] = PROTOCOLS
    gates: tuple[str, ...] = GATES
    mask: str = "binary"
    delta: str = "off"
    split: str = "test"
    layer: str = "all"


@dataclass(frozen=True)
class Points:
    """
    `data`: one row per point (mean over seeds). `left_out`: reason -> number of (run, condition) points that could not be drawn.
    `facts`: what the rows have in common, for captions.
    """

    data: pd.DataFrame
    left_out: dict[str, int] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy in which a missing text is empty (as CSV loses the difference), a missing seed is -1 and trainable is a plain bool."""
    data = frame.reset_index(drop=True)
    for name, (dtype, _) in COLUMNS.items():
        if dtype == "string" and name in data:
            data[name] = data[name].astype("string").fillna("").astype(object)
    for name, missing, kind in (("seed", -1, int), ("trainable", True, bool)):
        if name in data:
            data[name] = data[name].fillna(missing).astype(kind)
    return data


def told_apart(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with what an experiment tells its runs apart by in their families, where those do not say it already, and no conditions."""
    if "condition" not in frame or (words := frame["condition"].fillna("").astype(str)).eq("").all():
        return frame
    known = {text: [pair.partition("=")[2] for pair in text.split("; ")] for text in set(words) - {""}}
    family = [
        ", ".join([name, *(v for v in known.get(text, []) if v not in name)]) for name, text in zip(frame["family"], words, strict=True)
    ]
    return frame.assign(family=pd.Series(family, index=frame.index, dtype="string"), condition="")


def variants_apart(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its variant in the name of every family that has several: what would be a mean over settings is one line for each.

    `setting` is the variant there, and empty elsewhere.
    """
    several = frame.groupby(["family", "kind"])["variant"].transform("nunique") > 1
    names = frame["family"].where(~several, frame["family"] + ", " + frame["variant"])
    return frame.assign(family=names, setting=frame["variant"].where(several, ""))


def _keep(data: pd.DataFrame, column: str, wanted: tuple[str, ...], option: str) -> pd.DataFrame:
    """The rows with one of the wanted values; raises ValueError where one of them has no row at all."""
    present = sorted(data[column].unique())
    missing = [value for value in wanted if value not in present]
    if missing:
        raise ValueError(
            f"no results with {column} {', '.join(map(repr, missing))} (there are: {', '.join(present) or 'none'}): "
            f"evaluate the runs under it or pass another {option}"
        )
    return data[data[column].isin(wanted)]


def _same(data: pd.DataFrame, column: str, where: str = "") -> str:
    """The one value that these rows share; raises ValueError where they differ."""
    values = sorted(map(str, data[column].unique()))
    if len(values) > 1:
        raise ValueError(
            f"rows of different {column}{where} ({', '.join(values[:4])}) cannot share axes: "
            f"keep one, such as frame[frame.{column} == {values[0]!r}]"
        )
    return values[0]


def rows(frame: pd.DataFrame, metrics: tuple[str, ...], view: View) -> pd.DataFrame:
    """The rows of these metrics under the view's conditions; raises ValueError where there are none or they are not comparable."""
    clean = tidy(frame)
    data = _keep(clean, "metric", metrics, "metric")
    data = _keep(data, "split", (view.split,), "split")
    data = _keep(data, "layer", (view.layer,), "layer")
    data = _keep(data, "site", ("all",), "layer")
    data = _keep(data, "mask", (view.mask,), "mask")
    data = _keep(data, "delta", (view.delta,), "delta")
    data = _keep(data, "protocol", view.protocols, "protocols")
    data = data[data["gates"].isin(view.gates)].drop_duplicates()
    if data.empty:
        raise ValueError(f"no results with gates {', '.join(view.gates)}: evaluate the runs with them or pass other gates")
    for column in COMPARABLE:
        _same(data, column)
    for protocol, group in data.groupby("protocol"):
        _same(group, "layers", f" under {protocol}")
    for metric, group in data.groupby("metric"):
        _same(group, "metric_version", f" of {metric}")
    return with_origin(clean, data)


def with_origin(clean: pd.DataFrame, data: pd.DataFrame) -> pd.DataFrame:
    """
    Adds `origin`: for an inference row the trained variant of its checkpoint. What needs no training becomes the curve `floor`, of
    which a variant that the sweep meets again is kept once.
    """
    trained = clean[clean["curve"] == "trained"].drop_duplicates("run_id").set_index("run_id")["variant"]
    origin = data["run_id"].map(trained).fillna(data["run_id"])
    inference = data["trainable"] & (data["curve"] == "inference")
    data = data.assign(origin=origin.where(inference, ""), curve=data["curve"].where(data["trainable"], "floor"))
    repeated = data.duplicated([*RUN, "metric", "base"], keep=False) & (data["curve"] == "floor")
    return data[~(repeated & (clean.loc[data.index, "curve"] == "inference"))]


def _joined(data: pd.DataFrame, view: View) -> pd.DataFrame:
    """One row per run and condition with the values of both metrics; raises ValueError for two different values of the same thing."""
    key = [*RUN, "origin"]
    parts = []
    for name, metric in (("x", view.x), ("y", view.y)):
        part = data[(data["metric"] == metric) & (data["base"] == "")]
        if (twice := part.duplicated(key)).any():
            run = part.loc[twice, "run_id"].iloc[0]
            raise ValueError(f"results hold two different values of {metric} for run {run}: keep one evaluation of each run")
        columns = {"value": name, "lo": f"{name}_lo", "hi": f"{name}_hi", "applicable": f"{name}_applicable"}
        extra = ["n", "converged"] if name == "y" else []
        parts.append(part[[*key, *columns, *extra]].rename(columns=columns))
    return parts[0].merge(parts[1], on=key, how="outer")


def _sorted_out(joined: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """The points that can be drawn on a logarithmic x axis, and for the others how many were left out for which reason."""
    x, y = (joined[name].to_numpy(dtype=float, na_value=np.nan) for name in ("x", "y"))
    inapplicable = ((joined["x_applicable"] == "no") | (joined["y_applicable"] == "no")).to_numpy(dtype=bool)
    absent = (joined["x_applicable"].isna() | joined["y_applicable"].isna()).to_numpy(dtype=bool)
    reasons = {
        "not applicable": inapplicable,
        "measured on one axis only": absent & ~inapplicable,
        "not finite": ~inapplicable & ~absent & ~(np.isfinite(x) & np.isfinite(y)),
    }
    bad = np.logical_or.reduce(list(reasons.values()))
    reasons["nothing active (x of 0)"] = ~bad & ~(x > 0)
    bad = bad | reasons["nothing active (x of 0)"]
    return joined[~bad], {reason: int(which.sum()) for reason, which in reasons.items() if which.any()}


def _averaged(drawable: pd.DataFrame) -> pd.DataFrame:
    """One row per point: mean and interval over seeds in x and y, scored tokens, convergence; sorted by x within a curve."""
    by = [*CURVE, "variant"]
    groups = drawable.groupby(by)
    parts = [pd.DataFrame({"n": groups["n"].min().fillna(0).astype(int), "converged": groups["converged"].agg(together)})]
    for name in ("x", "y"):
        estimate = over_seeds(drawable, by, name, f"{name}_lo", f"{name}_hi")
        parts.append(estimate.rename(columns={"mean": name, "lo": f"{name}_lo", "hi": f"{name}_hi"}))
    table = pd.concat([parts[0], parts[1], parts[2].drop(columns="seeds")], axis=1).reset_index()
    return table.sort_values([*CURVE, "x", "y"], ignore_index=True, kind="stable")


def points(frame: pd.DataFrame, view: View | None = None) -> Points:
    """
    The points of every curve, sorted by x within a curve; columns: CURVE, variant, seeds, n, x, x_lo, x_hi, y, y_lo, y_hi, converged.
    Raises ValueError with one line where rows are missing or must not share axes.
    """
    view = view or View()
    frame = told_apart(frame)
    if view.x == view.y:
        raise ValueError(f"x and y are both {view.x}: choose two metrics")
    data = rows(frame, (view.x, view.y), view)
    drawable, left_out = _sorted_out(_joined(data, view))
    if drawable.empty:
        raise ValueError(f"no finite {view.y} against {view.x} to draw ({left_out}): look at the rows' reason column")
    table = _averaged(drawable)
    facts = {column: str(data[column].iloc[0]) for column in COMPARABLE}
    facts["layers"] = "; ".join(sorted(data["layers"].unique()))
    versions = data.groupby("metric")["metric_version"].first()
    facts |= {axis: str(versions[metric]) for axis, metric in (("x_version", view.x), ("y_version", view.y))}
    known = set(zip(frame["family"], frame["kind"], strict=True))
    facts["absent"] = ", ".join(sorted({family for family, kind in known - set(zip(table["family"], table["kind"], strict=True))}))
    return Points(table, left_out, facts)


def curves(data: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Every curve with its names (protocol, gates, family, kind, curve, origin) and its points."""
    for key, own in data.groupby(CURVE):
        yield dict(zip(CURVE, map(str, key), strict=True)), own  # type: ignore[arg-type]


def same_for_both_gates(data: pd.DataFrame) -> pd.Series:
    """True for each point of a self-gated curve that coincides with its clean-gated counterpart throughout, so that one is enough."""
    key = [name for name in CURVE if name != "gates"]
    clean, own = (data[data["gates"] == gates] for gates in GATES)
    both = own.reset_index().merge(clean, on=[*key, "variant"], how="outer", suffixes=("", "_clean"))
    pairs = [(both[name].to_numpy(float), both[f"{name}_clean"].to_numpy(float)) for name in ("x", "y", "seeds")]
    both["equal"] = np.logical_and.reduce([np.isclose(one, other, rtol=1e-6, atol=1e-12) for one, other in pairs])
    throughout = both.groupby(key)["equal"].transform("all")
    return pd.Series(data.index.isin(both.loc[throughout, "index"]), index=data.index)
