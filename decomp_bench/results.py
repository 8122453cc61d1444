"""The tidy results schema: one row for each (run, protocol, condition, layer, site, metric). Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from decomp_bench.files import atomically

SCHEMA_VERSION = 1

# Column -> (pandas dtype, meaning). The order is the order in every file.
COLUMNS: dict[str, tuple[str, str]] = {
    "run_id": ("string", "run that was measured"),
    "experiment": ("string", "experiment the run belongs to, empty for a run made by hand"),
    "method": ("string", "registered name of the method"),
    "kind": ("string", "replacement (computes y from u) or autoencoding (sees y); never ranked together"),
    "trainable": ("boolean", "false for floors that nothing was trained for"),
    "family": ("string", "curve that the run is a point of: the method and what distinguishes its training from its siblings'"),
    "variant": ("string", "the swept values, such as k=32"),
    "curve": ("string", "trained (its own training) or inference (another sparsity of one checkpoint)"),
    "target": ("string", "URI of the frozen model"),
    "target_hash": ("string", "hash of the frozen model's weights"),
    "dataset": ("string", "name of the text or toy distribution"),
    "token_hash": ("string", "hash of the evaluation tokens; rows of different hashes are not compared"),
    "split": ("string", "train, validation or test"),
    "seed": ("Int64", "training seed"),
    "layers": ("string", "layers replaced together, such as 0,1,2,3"),
    "layer": ("string", "layer that the value belongs to, or all"),
    "site": ("string", "site that the value belongs to, or all"),
    "protocol": ("string", "cascading, clean or single"),
    "gates": ("string", "clean or self: the pass that the gates were computed in"),
    "mask": ("string", "binary (gate above its threshold), soft (gate as mask) or all (every component on)"),
    "delta": ("string", "off or on: whether the dense remainder of the weights runs"),
    "init": ("string", "initialisation of the components, empty where the method has one only"),
    "base": ("string", "ablation that a recovered share refers to: mean or zero, else empty"),
    "positions": ("string", "scored positions, such as 1: (the first is never replaced nor scored)"),
    "condition": (
        "string",
        "what else a measurement varied, such as `concept=graphs; factor=2`, or how an experiment tells its runs apart",
    ),
    "metric": ("string", "key in the metric catalogue"),
    "metric_version": ("Int64", "version of the metric's definition"),
    "value": ("float64", "the value, NaN where not applicable"),
    "lo": ("float64", "lower end of the 95% document bootstrap interval"),
    "hi": ("float64", "upper end"),
    "n": ("Int64", "scored tokens; of a measurement what its interval is over, such as documents or prompts"),
    "applicable": ("string", "yes, no or trivial (true by construction)"),
    "reason": ("string", "why not applicable or trivial"),
    "converged": ("string", "yes, no or unknown: did the last third of training still move the headline metric by more than its interval"),
    "step": ("Int64", "training steps taken"),
    "schema_version": ("Int64", "version of this schema"),
}


def condition(**varied: object) -> str:
    """A condition in words: `key=value` pairs, those without a value left out."""
    return "; ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in varied.items() if value != "")


def unfolded(data: pd.DataFrame) -> pd.DataFrame:
    """The frame with a column of text for each key of its conditions, empty where a row has none; numbers stay as they were written."""
    parts = [dict(pair.split("=", 1) for pair in text.split("; ") if pair) for text in data["condition"].fillna("")]
    return data.assign(**{key: [part.get(key, "") for part in parts] for key in dict.fromkeys(key for part in parts for key in part)})


def frame(rows: Iterable[dict]) -> pd.DataFrame:
    """Rows as a results frame, every column present and typed; raises KeyError for a column that the schema lacks."""
    rows = list(rows)
    unknown = {key for row in rows for key in row} - COLUMNS.keys()
    if unknown:
        raise KeyError(f"not in the results schema: {', '.join(sorted(unknown))}")
    data = pd.DataFrame(rows, columns=list(COLUMNS))
    data["schema_version"] = SCHEMA_VERSION
    return data.astype({name: dtype for name, (dtype, _) in COLUMNS.items()})


def write(data: pd.DataFrame, path: Path) -> None:
    """Write a frame as parquet or CSV (by suffix), atomically."""
    csv = path.suffix == ".csv"
    atomically(path, lambda file: data.to_csv(file, index=False) if csv else data.to_parquet(file, index=False))


def read(path: Path | str) -> pd.DataFrame:
    """Read a results file; raises ValueError with one line for a missing file, a broken one or another schema version."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no results at {path}: run the experiment first")
    try:
        data = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except Exception as error:
        raise ValueError(f"{path} is not a results file ({type(error).__name__}): delete it and run again") from error
    found = set(data.get("schema_version", pd.Series([None])).unique())
    if found - {SCHEMA_VERSION}:
        raise ValueError(
            f"{path} has results schema {sorted(map(str, found))}, this version reads {SCHEMA_VERSION}: evaluate the runs again"
        )
    if "condition" not in data:  # the column is younger than the first results
        data["condition"] = ""
    return data.astype({name: dtype for name, (dtype, _) in COLUMNS.items() if name in data})
