"""The table of runs as text: Markdown, and LaTeX with booktabs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from .model_table import KEYS
from .points import PROTOCOLS

Cells = list[list[str]]
SPECIAL = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--"}


def markdown(data: pd.DataFrame) -> str:
    """Two tables for each target and set of tokens: what the runs are and cost, and what they keep."""
    parts = ["# Every run at hand\n"]
    for title, note, heads, cells in _tables(data):
        lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2), *cells]
        parts.append(f"## {title}\n\n{note}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def latex(data: pd.DataFrame) -> str:
    r"""The same as `table*` environments for `\usepackage{booktabs}`."""
    parts = [r"% \usepackage{booktabs}"]
    for title, note, heads, cells in _tables(data):
        body = "\n".join(" & ".join(map(_escaped, line)) + r" \\" for line in cells)
        columns = "ll" + "r" * (len(heads) - 2)
        parts.append(
            "\\begin{table*}\n\\centering\\small\n"
            f"\\caption{{{_escaped(title)}. {_escaped(note)}}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
            f"{' & '.join(map(_escaped, heads))} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table*}}"
        )
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def _tables(data: pd.DataFrame) -> Iterator[tuple[str, str, list[str], Cells]]:
    """Title, note, heads and cells of each table."""
    for _, own in data.groupby(KEYS, sort=False):
        first = own.iloc[0]
        about = f"{first['target']}, layers {first['layers']}, {first['tokens']:,} tokens of {first['dataset']} ({first['token_hash'][:8]})"
        heads, cells = _columns(own, SIZE_COLUMNS)
        note = "Components are counted under cascading with gates of the clean pass, on the scored tokens; costs are means over seeds."
        yield f"What they are and cost: {about}", note, heads, cells
        heads, cells = _columns(own, dict(_kept(own)))
        intervals = "; ".join(sorted(set(own["interval"])))
        note = f"Split {first['split']}, positions {first['positions']}; ± is the wider half of the interval: {intervals}."
        yield f"What they keep: {about}", note, heads, cells


Column = Callable[[pd.Series], str]


def _columns(own: pd.DataFrame, columns: dict[str, Column]) -> tuple[list[str], Cells]:
    """Heads and cells; a column that is empty throughout is left out."""
    names = {"run": lambda row: str(row["family"]), "setting": lambda row: "; ".join(filter(None, (row["variant"], row["condition"])))}
    made = {name: [column(row) for _, row in own.iterrows()] for name, column in (names | columns).items()}
    kept = {name: cells for name, cells in made.items() if name in names or any(cell != "" for cell in cells)}
    return list(kept), [list(line) for line in zip(*kept.values(), strict=True)]


def _number(key: str, form: Callable[[float], str]) -> Column:
    return lambda row: form(float(row[key])) if key in row and np.isfinite(row[key]) else ""


def short(value: float) -> str:
    """Three digits with a unit: 0.123, 12.3, 1.2k, 3.4M."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _share(value: float) -> str:
    return f"{100 * value:.0f}%"


SIZE_COLUMNS: dict[str, Column] = {
    "seeds": _number("seeds", short),
    "components": _number("components", lambda n: f"{n:,.0f}"),
    "alive": _number("alive", lambda n: f"{n:,.0f}"),
    "dead": _number("dead", _share),
    "dense": _number("dense", _share),
    "L0 per MLP": _number("l0_mlp", short),
    "parameters": _number("parameters", short),
    "active": _number("active_params", short),
    "train tokens": _number("train_tokens", short),
    "FLOPs": _number("flops", short),
    "wall s": _number("wall_s", short),
    "CPU s": _number("cpu_s", short),
    "memory MB": _number("memory_mb", short),
    "converged": lambda row: str(row["converged"]),
}


def _kept(own: pd.DataFrame) -> Iterator[tuple[str, Column]]:
    """Cross-entropy (or a toy's error) and FVU under every protocol and gate source; `=` where clean gates give what its own give."""
    named = {"ce_delta": "CE", "output_mse": "MSE", "fvu": "FVU"}
    for metric, label in named.items():
        for protocol in PROTOCOLS:
            for gates in ("self", "clean"):
                key = f"{metric} {protocol} {gates}"
                if key in own:
                    yield f"{label} {protocol}, {gates}", _with_interval(key, f"{metric} {protocol} self")


def _with_interval(key: str, same: str) -> Column:
    def written(row: pd.Series) -> str:
        value, low, high = (float(row.get(name, np.nan)) for name in (key, f"{key} lo", f"{key} hi"))
        if key != same and np.isclose(value, float(row.get(same, np.nan)), rtol=1e-6):
            return "="
        if not np.isfinite(value):
            return "n/a"
        half = np.nanmax([value - low, high - value]) if np.isfinite([low, high]).any() else np.nan
        return f"{value:.3f} ±{half:.3f}" if np.isfinite(half) else f"{value:.3f}"

    return written
