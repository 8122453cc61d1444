"""What results were made with and what they cost, from the manifests of their runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.report.page import count, link, number
from decomp_bench.report.tables import Cell, Head, Table, cell

if TYPE_CHECKING:
    import pandas as pd

Facts = list[tuple[str, str]]
Manifest = Mapping[str, Any]


def facts(manifests: Sequence[Manifest], frame: pd.DataFrame | None = None) -> Facts:
    """Name and value of everything that runs have in common or differ in: code, packages, machines, data, seeds, cost."""
    found: Facts = []
    if frame is not None:
        found += [
            ("target", _distinct(f"{uri} (weights {hashed})" for uri, hashed in _pairs(frame, "target", "target_hash"))),
            ("scored on", _distinct(_scored(frame))),
            ("seeds", _distinct(str(seed) for seed in sorted(frame["seed"].dropna().unique()))),
        ]
    if manifests:
        found += [
            ("corpus", _distinct(f"{one.get('corpus')} ({one.get('corpus_hash')})" for one in manifests)),
            ("code", _distinct(commit(one) for one in manifests)),
            ("weights trained by", _distinct(commit(one["trained_in"]) for one in manifests if "trained_in" in one)),
            ("machine", _distinct(_machine(one.get("hardware", {})) for one in manifests)),
            ("packages", ", ".join(_packages(manifests))),
            ("cost", _cost(manifests)),
        ]
    return [(name, value) for name, value in found if value]


def commit(manifest: Manifest) -> str:
    """The commit that made something, and whether the code differed from it."""
    git = manifest.get("git") or {}
    return f"{(git.get('commit') or 'unknown commit')[:12]}{' with changes' if git.get('dirty') else ''}"


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def _pairs(frame: pd.DataFrame, *columns: str) -> list[tuple]:
    return list(frame[list(columns)].drop_duplicates().itertuples(index=False, name=None))


def _scored(frame: pd.DataFrame) -> list[str]:
    keys = ["dataset", "split", "token_hash", "positions"]
    known = frame.dropna(subset=["n"]).groupby(keys, dropna=False, as_index=False)["n"].max()
    return [
        f"{number(int(one['n']))} tokens of {one['dataset']}, {one['split']} split ({one['token_hash']}), positions {one['positions']}"
        for one in known.to_dict("records")  # type: ignore[call-overload]
    ]


def _machine(hardware: Manifest) -> str:
    parts = [str(hardware.get("cpu", "unknown processor")), count(int(hardware.get("cores", 0)), "core")]
    parts += [str(hardware["gpu"])] if hardware.get("gpu") else []
    return ", ".join([*parts, f"{hardware.get('memory_gb')} GiB", f"Python {hardware.get('python')}", str(hardware.get("system"))])


def _packages(manifests: Sequence[Manifest]) -> list[str]:
    versions: dict[str, dict[str, None]] = {}
    for one in manifests:
        for name, version in one.get("packages", {}).items():
            versions.setdefault(name, {})[str(version)] = None
    return [f"{name} {' or '.join(found)}" for name, found in sorted(versions.items())]


def _cost(manifests: Sequence[Manifest]) -> str:
    costs = [one.get("cost") or {} for one in manifests]

    def total(key: str) -> float:
        return sum(float(one.get(key) or 0) for one in costs)

    parts = [count(len(manifests), "run"), f"training {_minutes(total('train_wall_s'))} ({_minutes(total('train_cpu_s'))} of CPU)"]
    parts += [f"GPU {_minutes(total('gpu_s'))}"] if total("gpu_s") else []
    parts += [f"evaluation {_minutes(total('evaluate_wall_s'))}", f"{number(int(total('tokens')))} training tokens"]
    parts += [
        f"{total('flops'):.2e} FLOPs",
        f"at most {number(max((one.get('peak_memory_mb') or 0 for one in costs), default=0))} MiB of memory",
    ]
    return ", ".join(parts)


def _minutes(seconds: float) -> str:
    return f"{number(seconds / 60)} min"


def runs_table(manifests: Mapping[str, Manifest], page: Path, runs: Path) -> Table:
    """A line for each run: how far it was trained, its cost, its code, and its own page where that is there."""
    heads = [Head("run"), Head("status"), Head("converged")]
    names = {
        "steps": "steps",
        "tokens": "training tokens",
        "train_wall_s": "training (s)",
        "evaluate_wall_s": "evaluation (s)",
        "flops": "FLOPs",
        "peak_memory_mb": "memory (MiB)",
    }
    heads += [*(Head(name, "", True) for name in names.values()), Head("code")]
    rows: list[list[Cell]] = []
    for name, one in sorted(manifests.items()):
        values = {**(one.get("cost") or {}), "steps": one.get("steps")}
        first = [cell(name, address=link(page, runs / name / page.name)), cell(one.get("status")), cell(one.get("converged"))]
        rows.append([*first, *(cell(values.get(key)) for key in names), cell(commit(one))])
    return Table("Runs", heads, rows)
