"""Tables of a page: every cell with what it reads as and what it sorts by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from decomp_bench.report.page import NOTHING, number

if TYPE_CHECKING:
    import pandas as pd

DETAILS = (
    *("ce", "ce_clean", "ce_mean", "ce_zero", "ce_recovered_zero", "agreement", "norm_mse", "fvu_trimmed"),
    *("l0_module", "l0_node", "l0_attention", "l0_median", "l0_p95", "effective", "dense"),
)
"""Metrics that restate others or only explain them: they are in the results beside the page, and not in its table."""
FIRST = ("l0_mlp", "active_params", "bits", "ce_delta", "output_mse", "kl", "ce_recovered_mean", "fvu")
CONDITIONS = ("family", "variant", "curve", "protocol", "gates", "mask", "delta")
POINTS_LIMIT = 2000
"""Rows of a table that a page holds."""


class Head(NamedTuple):
    """A column: its name, what it means, and whether it holds numbers."""

    name: str
    about: str = ""
    numeric: bool = False


class Cell(NamedTuple):
    """What a cell reads as, what it sorts by, and a smaller second line."""

    text: str
    key: str
    note: str = ""
    address: str = ""


@dataclass
class Table:
    """Columns and rows; `note` says what was left out and what the columns have in common."""

    caption: str
    heads: list[Head]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""


def cell(value: Any, note: str = "", address: str = "") -> Cell:
    """A cell of any value; a number sorts as a number, and one that is not finite last."""
    if isinstance(value, (bool, np.bool_)) or value is None:
        text = {True: "yes", False: "no", None: NOTHING}[None if value is None else bool(value)]
        return Cell(text, text, note, address)
    if isinstance(value, (int, float, np.integer, np.floating)):
        plain = float(value)
        return Cell(number(int(value) if plain.is_integer() else plain), f"{plain:.6g}" if np.isfinite(plain) else "", note, address)
    return Cell(str(value), str(value), note, address)


def interval(value: float, low: float, high: float) -> Cell:
    """A value with its interval, where there is one."""
    made = cell(value)
    ends = (number(low), number(high))
    return made._replace(note=f"{ends[0]} to {ends[1]}") if {*ends} - {made.text, NOTHING} and made.key else made


def plain(caption: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> Table:
    """Rows of one shape as a table; beyond the limit they are counted in the note."""
    names = list(rows[0]) if rows else []
    numeric = {name: any(isinstance(row[name], (int, float)) for row in rows) for name in names}
    made = Table(
        caption, [Head(name, "", numeric[name]) for name in names], [[cell(row[name]) for name in names] for row in rows[:POINTS_LIMIT]]
    )
    left = f"{len(rows) - POINTS_LIMIT:,} further rows are left out. " if len(rows) > POINTS_LIMIT else ""
    made.note = f"{left}{note}"
    return made


def from_file(path: Path) -> Table:
    """A table of a CSV or parquet file; one that cannot be read says so."""
    import pandas as pd

    caption = path.stem.replace("_", " ").capitalize()
    try:
        data = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:
        return Table(caption, [], [], f"{path.name} cannot be read ({type(error).__name__})")
    return plain(caption, data.astype(object).where(data.notna(), None).to_dict("records"), path.name)  # type: ignore[arg-type]


# ---- points


def points(frame: pd.DataFrame) -> Table:
    """Every point of a results frame, over all layers and sites: mean over seeds and interval of each metric, under what conditions."""
    import pandas as pd

    from decomp_bench import analysis

    parts = []
    for (split, mask, delta), own in frame.groupby(["split", "mask", "delta"]):
        protocols = tuple(name for name in analysis.PROTOCOLS if name in set(own["protocol"]))
        try:
            found = analysis.table(own, None, analysis.View(protocols=protocols, mask=str(mask), delta=str(delta), split=str(split)))
        except ValueError as error:
            return Table("Points", [], [], f"No table: {error}")
        parts.append(found.assign(mask=mask, delta=delta))
    data = pd.concat(parts, ignore_index=True)
    data["column"] = [
        f"{metric}_{base}" if base and not metric.endswith(base) else metric
        for metric, base in zip(data["metric"], data["base"], strict=True)
    ]
    return _wide(data)


def _wide(data: pd.DataFrame) -> Table:
    columns = _columns(data)
    varied = [name for name in CONDITIONS if name not in ("mask", "delta") or data[name].nunique() > 1]
    metric = dict(zip(data["column"], data["metric"], strict=True))
    heads = [Head(name, ABOUT[name]) for name in varied] + metric_heads({name: metric[name] for name in columns})
    heads += [Head("seeds", ABOUT["seeds"], True), Head("converged", ABOUT["converged"])]
    rows = []
    for own in sorted((own for _, own in data.groupby([*CONDITIONS, "kind"], sort=False)), key=_order):
        one = own.iloc[0]
        values = {str(row["column"]): interval(row["mean"], row["lo"], row["hi"]) for _, row in own.iterrows()}
        text = [cell(one[name], "sees y" if name == "family" and one["kind"] == "autoencoding" else "") for name in varied]
        rows.append([*text, *(values.get(name, cell(None)) for name in columns), cell(int(own["seeds"].max())), cell(one["converged"])])
    left = f"{len(rows) - POINTS_LIMIT:,} further points are left out: see results.parquet. " if len(rows) > POINTS_LIMIT else ""
    intervals = sorted(set(data["interval"]) - {""})
    note = f"{left}Below a value: its interval ({'; '.join(intervals)}). Other metrics, layers and sites are in results.parquet."
    return Table("Points", heads, rows[:POINTS_LIMIT], note)


def _order(own: pd.DataFrame) -> tuple:
    """What was trained before floors, replacements before what sees y, the usual conditions before controls, few active before many."""
    one, size = own.iloc[0], own.loc[own["metric"] == "active_params", "mean"]
    unusual = (one["mask"] != "binary", one["delta"] != "off")
    place = (
        one["kind"] != "replacement",
        not one["trainable"],
        one["family"],
        *unusual,
        one["protocol"],
        one["gates"],
        one["curve"] != "trained",
    )
    return (*place, float(size.iloc[0]) if len(size) else 0.0)


ABOUT = {
    "family": "method and what distinguishes its training; sees y: it compresses the true output and is not ranked with the others",
    "variant": "swept values",
    "curve": "trained: its own training; inference: another sparsity of one checkpoint",
    "protocol": "cascading: on the replaced stream; clean: on clean inputs; single: one layer at a time",
    "gates": "pass that the gates were computed in",
    "mask": "binary, soft, or all components on",
    "delta": "whether the dense remainder runs",
    "seeds": "training seeds that the mean is over",
    "converged": "whether the last third of training moved the headline metric by no more than its interval",
}


def _columns(data: pd.DataFrame) -> list[str]:
    there = list(dict.fromkeys(data.loc[data["mean"].notna(), "column"]))
    shown = [name for name in there if name not in DETAILS]
    return sorted(shown, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def metric_heads(columns: Mapping[str, str]) -> list[Head]:
    """Heads of columns that hold metrics (name of the column -> metric), as the catalogue describes them."""
    from decomp_bench.metrics import metric_catalogue

    known = {entry["key"]: entry for entry in metric_catalogue()}
    heads = []
    for name, metric in columns.items():
        entry = known.get(metric, {"title": name, "unit": "", "formula": "", "direction": "none"})
        better = {"lower": "; lower is better", "higher": "; higher is better"}.get(entry["direction"], "")
        title = f"{entry['title']} ({entry['unit']})" if entry["unit"] else entry["title"]
        heads.append(Head(title, f"{name}: {entry['formula']}{better}", True))
    return heads


def without_value(frame: pd.DataFrame) -> Table | None:
    """What could not be measured, with the reason and how many rows it concerns."""
    missing = frame[(frame["applicable"] == "no") | frame["value"].isna()]
    if missing.empty:
        return None
    known = missing.assign(reason=missing["reason"].fillna("").replace("", "not finite"))
    found = known.groupby(["family", "metric", "reason"], as_index=False).agg(
        protocols=("protocol", _several), gates=("gates", _several), rows=("value", "size")
    )
    return plain("Not measured", found.to_dict("records"))  # type: ignore[arg-type]


def _several(values: pd.Series) -> str:
    return ", ".join(sorted(set(values)))
