"""What the commands print: progress while runs go on, tables when they are done."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from decomp_bench.workers import Group, Overview

WIDE = 165
"""Columns where the output is not a terminal."""


def console() -> Any:
    """Where tables go."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=WIDE, color_system=None)


def show(rows: Sequence[dict[str, Any]], as_json: bool, empty: str = "nothing there") -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(list(rows), indent=2, default=str))
        return
    if not rows:
        print(empty)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def duration(seconds: float | None) -> str:
    """Such as 4:05 or 1:02:09; a question mark where it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(event: dict[str, Any]) -> str:
    """One progress event in one line."""
    phase = str(event.get("phase", "waiting"))
    said = {"load": "loading the target and its data", "prepare": "preparing to train", "train": "training", "evaluate": "evaluating"}
    parts = [said.get(phase, phase)]
    if phase == "measure":
        return f"measuring {event.get('what', '')}  {100 * event.get('step', 0) // max(1, event.get('steps', 1))}%"
    if event.get("steps"):
        parts.append(f"{event.get('step', 0)}/{event['steps']}")
    if event.get("batches"):
        parts.append(f"batch {event.get('batch', 0)}/{event['batches']}")
    for key, form in (("loss", "loss {:.4g}"), ("l0", "L0 {:.3g}"), ("tokens_per_s", "{:,.0f} tok/s")):
        if event.get(key) is not None:
            parts.append(form.format(event[key]))
    if event.get("running", 1) > 1:
        parts.append(f"{event['running']} runs")
    if event.get("eta_s") is not None:
        parts.append(f"{duration(event['eta_s'])} left")
    return "  ".join(parts)


class Line:
    """Progress of runs in this process: one line that rewrites itself, or a line now and then where the output is no terminal."""

    def __init__(self, every: float = 15.0) -> None:
        self.terminal, self.every = sys.stderr.isatty(), every
        self.shown, self.phase = 0.0, ""

    def __call__(self, event: dict[str, Any]) -> None:
        moment = time.monotonic()
        if self.terminal:
            if moment - self.shown > 0.1 or event.get("phase") != self.phase:
                print(f"\r\033[K{describe(event)}", end="", file=sys.stderr, flush=True)
                self.shown = moment
        elif event.get("phase") != self.phase or moment - self.shown > self.every:
            print(describe(event), file=sys.stderr, flush=True)
            self.shown = moment
        self.phase = event.get("phase", "")

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Board:
    """Progress of worker processes: a line for each group of runs, and the time left in all."""

    def __init__(self, every: float = 20.0) -> None:
        self.terminal, self.every, self.shown = sys.stderr.isatty(), every, -1e9
        self.finished: set[str] = set()
        self.live: Any = None

    def __enter__(self) -> Board:
        if self.terminal:
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, overview: Overview) -> None:
        if self.live is not None:
            self.live.update(_board(overview), refresh=True)
            return
        moment = time.monotonic()
        ended = [group for group in overview.groups if group.finished and group.label + str(id(group)) not in self.finished]
        for group in ended:
            self.finished.add(group.label + str(id(group)))
            print(f"{duration(overview.seconds)}  {group.label}: {_state(group)}", file=sys.stderr, flush=True)
        if moment - self.shown > self.every:
            self.shown = moment
            for group in overview.groups:
                if group.process is not None and not group.finished:
                    print(f"{duration(overview.seconds)}  {group.label}: {_state(group)}", file=sys.stderr)
            print(_total(overview), file=sys.stderr, flush=True)


def _state(group: Group) -> str:
    if group.finished:
        failed = [run.id for run in group.runs if run.status == "failed"]
        return f"failed: {group.error}" if group.error else f"failed: {', '.join(failed)}" if failed else "done"
    return describe(group.event) if group.process is not None else "waiting"


def _total(overview: Overview) -> str:
    done = sum(len(group.configs) for group in overview.groups if group.finished)
    runs = sum(len(group.configs) for group in overview.groups)
    return f"{done} of {runs} runs done, {duration(overview.seconds)} so far, about {duration(overview.left)} left"


def _board(overview: Overview) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for group in overview.groups:
        table.add_row(group.label, _state(group))
    table.add_row("", _total(overview), style="bold")
    return table


# ---- results


class Column(NamedTuple):
    """A column of the table: heading, metric, protocol, gates, and whether its interval is shown."""

    head: str
    metric: str
    protocol: str = "cascading"
    gates: str = "clean"
    interval: bool = False


def _columns(frame: pd.DataFrame) -> tuple[list[Column], str]:
    """The columns that a frame has values for, and what the headline metric is."""
    metrics, protocols, gates = (set(frame.loc[frame["value"].notna(), name]) for name in ("metric", "protocol", "gates"))
    headline = "ce_delta" if "ce_delta" in metrics else "output_mse"
    columns = [Column("L0/MLP", "l0_mlp"), Column("active\nparams", "active_params")]
    columns += [Column(f"{p}\n{g}", headline, p, g, True) for p in ("cascading", "clean", "single") for g in ("clean", "self")]
    columns += [Column("FVU\nsingle", "fvu", "single"), Column("alive", "alive")]
    found = [column for column in columns if column.metric in metrics and column.protocol in protocols and column.gates in gates]
    return found, headline


def summary(frame: pd.DataFrame) -> None:
    """Print what was measured, one line for each point: sparsity, fidelity under every protocol and both gate sources, convergence."""
    from decomp_bench.analysis import PROTOCOLS, View, table  # pyright: ignore[reportMissingImports] (installed from analysis/)

    columns, headline = _columns(frame)
    protocols = tuple(name for name in PROTOCOLS if name in set(frame["protocol"]))
    own = (frame["curve"] != "inference") | ~frame["trainable"].fillna(True).astype(bool)  # a floor's sweep is its curve
    try:
        data = table(frame[own], sorted({column.metric for column in columns}), View(protocols=protocols))
    except ValueError as error:
        print(f"no table: {error}")
        return
    own_gates = [column for column in columns if column.gates == "self"]
    if console().width >= WIDE or not own_gates:
        _print_points(data, columns)
    else:  # two tables, rather than one that is cut off
        _print_points(data, [column for column in columns if column.gates != "self"])
        _print_points(data, own_gates)
    what = "increase of cross-entropy (nats per token)" if headline == "ce_delta" else "mean squared difference from the target's output"
    print(f"cascading, clean, single: {what}, under gates from the clean pass (clean) or the same pass (self)")
    print(f"± is the wider half of a 95% interval, = the same as under clean gates; {_seeds(data)}; conv. = converged")


def _seeds(data: pd.DataFrame) -> str:
    counts = sorted(set(data["seeds"]) - {0})
    return f"{' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''} a point"


def _print_points(data: pd.DataFrame, columns: list[Column]) -> None:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("family", overflow="fold")
    shown.add_column("variant", overflow="fold", min_width=6)
    for column in columns:
        shown.add_column(column.head, justify="right", no_wrap=True)
    shown.add_column("conv.")
    for key, group in sorted(data.groupby(["kind", "trainable", "family", "variant"]), key=lambda item: _order(item[0], item[1])):
        kind, family, variant = str(key[0]), str(key[2]), str(key[3])
        cells = []
        for column in columns:
            text = _value(group, column)
            same = column.gates == "self" and text == _value(group, column._replace(gates="clean"))
            cells.append("=" if same and text != "-" else text)
        mark = " (sees y)" if kind == "autoencoding" and "sees y" not in family else ""
        shown.add_row(f"{family}{mark}", variant, *cells, group["converged"].iloc[0])
    console().print(shown)


def _order(key: tuple, group: pd.DataFrame) -> tuple:
    size = group.loc[group["metric"] == "active_params", "mean"]
    return (key[0] != "replacement", not key[1], key[2], float(size.iloc[0]) if len(size) else 0.0)


def _value(group: pd.DataFrame, column: Column) -> str:
    chosen = (group["metric"] == column.metric) & (group["protocol"] == column.protocol) & (group["gates"] == column.gates)
    found = group[chosen]
    if found.empty or found["mean"].isna().all():
        return "-"
    mean, low, high = (float(found.iloc[0][name]) for name in ("mean", "lo", "hi"))
    if not column.interval:
        return f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:.3g}" if abs(mean) >= 0.001 else f"{mean:.1g}"
    if column.metric != "ce_delta":
        return f"{mean:.2e} ±{max(high - mean, mean - low):.0e}"
    digits = 3 if abs(mean) >= 0.1 else 4
    return f"{mean:.{digits}f}" + (f" ±{max(high - mean, mean - low):.{digits}f}" if low == low else "")
