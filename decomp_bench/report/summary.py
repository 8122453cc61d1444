"""The tables of results/README.md and of experiments' pages, made again from the results: prose is written by hand, these numbers are not.

A table stands between `<!-- table: NAME ARGUMENTS -->` and `<!-- end -->`; what is between is replaced. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.errors import UserError
from decomp_bench.experiment import Experiment
from decomp_bench.files import write_text
from decomp_bench.noise import STEM, known_noise
from decomp_bench.report import readme
from decomp_bench.report.page import number

if TYPE_CHECKING:
    import pandas as pd

NAME = "README.md"
MARKED = re.compile(r"(<!-- table: (?P<words>[^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
CONDITIONS = (("cascading", "clean"), ("cascading", "self"), ("clean", "clean"), ("single", "clean"))
"""Protocol and gates of the columns of cross-entropy."""
NOISE = ("l0_mlp", "active_params", "bits", "ce_delta", "ce_recovered_mean", "kl", "fvu", "alive")


def update(root: Path, experiments: Sequence[Experiment]) -> list[Path]:
    """Make every table of ROOT/results/README.md and of the experiments' README.md again; the pages that have any.

    Raises UserError for a table that there is not, or whose results are missing.
    """
    pages = [path for path in (root / "results" / NAME, *(one.path / NAME for one in experiments)) if path.is_file()]
    texts = {path: text for path in pages if MARKED.search(text := path.read_text())}
    made = {path: MARKED.sub(lambda match, path=path: _table(path, match, root, experiments), text) for path, text in texts.items()}
    for path, text in made.items():
        write_text(text, path)
    return list(made)


def _table(path: Path, match: re.Match[str], root: Path, experiments: Sequence[Experiment]) -> str:
    """A marked table of a page with its marks."""
    name, *arguments = match["words"].split()
    if name not in TABLES:
        raise UserError(f"{path}: no table '{name}'; there are {', '.join(TABLES)}")
    try:
        text = TABLES[name](root, experiments, *arguments)
    except (TypeError, ValueError, OSError, KeyError) as error:
        raise UserError(f"{path}: table '{match['words']}': {error}") from None
    return f"{match[1]}\n{text}\n\n{match[3]}"


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table whose first `words` columns are text and whose others are numbers."""
    under = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (heads, under, *lines))


def experiments_table(root: Path, experiments: Sequence[Experiment]) -> str:
    """Every experiment: which results there are, and its verdict."""
    from decomp_bench.report.experiments import results_folders

    lines = []
    for one in experiments:
        folders = [path.name for path in results_folders(one) if not path.name.endswith("smoke")]
        verdict = readme.texts(one.path / "README.md").get("Verdict", "None yet.").split("\n\n")[0]
        address = f"[{one.name}](../experiments/{one.name}/README.md)"
        lines.append([address, ", ".join(folders) or "not yet", " ".join(verdict.split())])
    return markdown(("experiment", "results", "verdict"), lines, 3)


def points_table(root: Path, experiments: Sequence[Experiment], folder: str) -> str:
    """Every trained point and floor of a results folder: size, cross-entropy under each protocol, seeds, convergence.

    What computes an MLP's output and what is given it have a table each: they are not ranked together.
    """
    from decomp_bench import analysis, results

    frame = results.read(root / "results" / folder / "results.parquet")
    view = analysis.View(protocols=tuple(name for name in analysis.PROTOCOLS if name in set(frame["protocol"])))
    found = analysis.table(frame[frame["curve"] == "trained"], ["l0_mlp", "active_params", "ce_delta"], view)
    about = frame.iloc[0]
    parts = [f"`{folder}`: {about['target']}, {int(frame['n'].max()):,} scored tokens of {about['dataset']} ({about['split']})."]
    scored = set(found[found["metric"] == "ce_delta"][["protocol", "gates"]].itertuples(index=False, name=None))
    there = [where for where in CONDITIONS if where in scored]
    heads = ("setting", "L0 per MLP", "active parameters", *(f"CE, {p}, {g}" for p, g in there), "seeds", "converged")
    for kind, own in sorted(found.groupby("kind"), key=lambda item: item[0] != "replacement"):
        lines = [_point(str(family), str(variant), one, there) for (family, variant), one in own.groupby(["family", "variant"])]
        lines = [line for *_, line in sorted(lines, key=lambda line: line[:2])]
        parts.append(markdown((str(kind), *heads), lines, 2))
    return "\n\n".join(parts)


def _point(family: str, variant: str, own: pd.DataFrame, there: Sequence[tuple[str, str]]) -> tuple[str, float, list[str]]:
    """A line of the table of points, after what it is sorted by."""
    cell: dict[tuple[str, ...], Any] = {(str(row.metric), str(row.protocol), str(row.gates)): row for row in own.itertuples(index=False)}
    size = cell["l0_mlp", *CONDITIONS[0]]
    sizes = [number(cell[name, *CONDITIONS[0]].mean) for name in ("l0_mlp", "active_params")]
    losses = [_estimate(cell["ce_delta", *where]) if ("ce_delta", *where) in cell else "" for where in there]
    return family, float(size.mean), [family, variant, *sizes, *losses, str(size.seeds), str(size.converged)]


def _estimate(row: Any) -> str:
    half = max(row.mean - row.lo, row.hi - row.mean)
    return f"{row.mean:.3f} ±{half:.3f}" if math.isfinite(half) else number(row.mean)


def floors_table(root: Path, experiments: Sequence[Experiment], folder: str, x: str = "active_params", *control: str) -> str:
    """Every trained family against every floor of its kind, and against a family that is named in words, where their sizes overlap."""
    from decomp_bench import analysis, results

    frame = results.read(root / "results" / folder / "results.parquet")
    view = analysis.View(x=x, protocols=("cascading",), gates=("clean", "self"))
    lines = []
    for one in analysis.floor_check(frame, [" ".join(control)] if control else [], view):
        if one.verdict != "no overlap":
            shares = [f"{100 * share:.0f}%" for share in (one.lower, one.clearly_lower, one.clearly_higher)]
            names = [one.family, one.against, one.gates, f"{number(one.x_low)} to {number(one.x_high)}"]
            lines.append([*names, *shares, f"{one.mean_difference:+.3f}"])
    heads = ("trained", "against", "gates", x, "lower", "clearly lower", "clearly higher", "mean difference")
    return markdown(heads, lines, 4)


def matched_table(root: Path, experiments: Sequence[Experiment], folder: str, x: str, value: str, *sweeps: str) -> str:
    """Every family at one size, read off its curve seed by seed: cross-entropy under cascading by gates, and what a run's training took.

    With the word `sweeps`, off the curve of each checkpoint at inference time.
    """
    from decomp_bench import analysis, results

    frame = results.read(root / "results" / folder / "results.parquet")
    found = analysis.matched(frame, float(value), analysis.View(x=x, protocols=("cascading",)), bool(sweeps))
    cells = {(one.family, one.origin, one.kind, one.gates): one for one in found}
    seconds = _seconds(root / "results" / folder, analysis.told_apart(frame))
    lines = []
    for family, origin, kind in sorted({(one.family, one.origin, one.kind) for one in found}):
        own = [cells.get((family, origin, kind, gates)) for gates in ("clean", "self")]
        means = [one.mean for one in own if one and one.seeds]
        gap = f"{100 * (means[1] / means[0] - 1):.0f}%" if len(means) == len(own) else ""
        seeds = ", ".join(sorted({str(one.seeds) for one in own if one}, reverse=True))
        losses = [_estimate(one) if one and one.seeds else "" for one in own]
        lines.append([f"{family} ({origin})" if origin else family, kind, *losses, gap, seeds, number(seconds[family, kind])])
    read = "the curve of one checkpoint at inference time" if sweeps else "the curve of its trained settings"
    about = f"`{folder}`: cross-entropy, cascading, at {x} of {value}, read off {read}; empty where that does not reach it."
    return f"{about}\n\n{markdown(('family', 'kind', 'CE, clean gates', 'CE, own gates', 'gap', 'seeds', 'CPU-s a run'), lines, 2)}"


def _seconds(folder: Path, frame: pd.DataFrame) -> pd.Series:
    """CPU seconds of training, mean over the runs of a family and kind."""
    runs = json.loads((folder / "manifest.json").read_text())["runs"]
    once = frame.drop_duplicates("run_id")
    spent = once.assign(seconds=[runs[name].get("cost", {}).get("train_cpu_s", math.nan) for name in once["run_id"]])
    return spent.groupby(["family", "kind"])["seconds"].mean()


def noise_table(root: Path, experiments: Sequence[Experiment]) -> str:
    """The reseed noise of the metrics that are compared most, from every results folder that has several seeds of a config."""
    known = known_noise(root)
    lines = []
    for metric in NOISE:
        for one in known.get(metric, []):
            if (one["protocol"], one["gates"]) == CONDITIONS[0]:
                numbers = [number(one[name]) for name in ("sd", "document_half_width", "resolved_1", "resolved_3", "runs", "configs")]
                lines.append([metric, one["results"], *numbers])
    if not lines:
        return f"No results have several seeds of a config yet (`{STEM}.csv` is written beside those that do)."
    return markdown(("metric", "results", "sd over seeds", "documents ±", "1 seed", "3 seeds", "runs", "configs"), lines, 2)


def file_table(root: Path, experiments: Sequence[Experiment], file: str, *wanted: str) -> str:
    """Columns of a CSV file of results, numbers to three digits; of its rows those that arguments `COLUMN=VALUE`, `COLUMN!=VALUE` leave."""
    import pandas as pd

    data = pd.read_csv(root / "results" / file, keep_default_na=False, na_values=[""])
    for column, value in (word.split("=", 1) for word in wanted if "=" in word):
        kept = data[column.removesuffix("!")].astype(str) == value
        data = data[~kept if column.endswith("!") else kept]
    columns = [word for word in wanted if "=" not in word]
    data = data[columns]
    texts = sum(not pd.api.types.is_numeric_dtype(data[name]) for name in columns)
    lines = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in data.itertuples(index=False)]
    return f"`{file}`\n\n{markdown([name.replace('_', ' ') for name in columns], lines, texts)}"


TABLES: dict[str, Callable[..., str]] = {
    "experiments": experiments_table,
    "points": points_table,
    "floors": floors_table,
    "matched": matched_table,
    "noise": noise_table,
    "file": file_table,
}
