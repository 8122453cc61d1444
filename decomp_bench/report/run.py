"""A run's page: what it is, what it scored, how it was trained, and its components."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from decomp_bench.report import components, figures, provenance, tables
from decomp_bench.report.page import NAME, number, visible, write
from decomp_bench.report.tables import Head, Table, cell

if TYPE_CHECKING:
    import pandas as pd

    from decomp_bench.runs import Run

NOT_CURVES = ("step", "tokens", "seconds", "tokens_per_s")
LEVELS = 9
"""Shades of a token."""
DETAILED = ("fvu", "ce_delta", "l0_module", "alive", "dead")


class Piece(NamedTuple):
    """Text of one shade: `shade` is a class of the style sheet, empty for tokens where the component is off."""

    text: str
    shade: str
    title: str


def run_page(run: Run, settings: components.Settings | None, progress: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Write the page of a scored run into its folder.

    Its components are taken from what was computed before, or computed now; without settings they are shown only if they are there.
    Raises UserError where the run has no results.
    """
    frame = run.results()
    found = components.stored(run, settings)
    if found is None and settings is not None:
        found = components.compute(run, settings, progress)
    manifest, config = run.manifest, run.config
    about = [
        ("method", f"{config.method}, version {manifest.get('method_version')}"),
        ("what", _distinct(frame, "family", "variant", "init")),
        ("kind", _distinct(frame, "kind")),
        ("layers", ", ".join(map(str, config.layers))),
        ("status", f"{manifest.get('status')}, converged: {manifest.get('converged', 'unknown')}"),
    ]
    about += [("imported from", str(manifest["imported"]))] if "imported" in manifest else []
    return write(
        "run.html",
        run.path / NAME,
        run=run,
        about=about,
        scores=tables.points(frame),
        layers=by_layer(frame),
        unmeasured=tables.without_value(frame),
        curves=curves(run.path / "metrics.jsonl"),
        config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        facts=provenance.facts([manifest], frame),
        components=found and _shown(found),
        pictures=_pictures(run, found["toy"]) if found and found["toy"] else [],
    )


def _pictures(run: Run, looked: dict[str, Any]) -> list[figures.Picture]:
    """The figures of a run on a toy, also written as files into `figures/` of its folder."""
    from decomp_bench import analysis

    folder = run.path / "figures"
    for name, figure in analysis.toy_figures(looked).items():
        analysis.save(figure, folder / name)
    return figures.pictures(folder)


def _distinct(frame: pd.DataFrame, *columns: str) -> str:
    trained = frame[frame["curve"] == "trained"] if (frame["curve"] == "trained").any() else frame
    return ", ".join(value for name in columns for value in dict.fromkeys(trained[name].fillna("").tolist()[:1]) if value)


def by_layer(frame: pd.DataFrame) -> Table | None:
    """Each layer and site under the first protocol, gates and choice that has them; None where there are none."""
    apart = frame[
        ((frame["layer"] != "all") | (frame["site"] != "all")) & frame["metric"].isin(DETAILED) & (frame["base"].fillna("") == "")
    ]
    if apart.empty:
        return None
    keys = ["curve", "variant", "protocol", "gates", "mask", "delta"]
    groups = list(apart.groupby(keys, sort=False))
    condition, own = max(groups, key=lambda item: (item[0][0] == "trained", item[1]["metric"].nunique()))
    metrics = [name for name in DETAILED if name in set(own["metric"])]
    heads = tables.metric_heads({name: name for name in metrics})
    made = Table("Layers and sites", [Head("layer", "", True), Head("site"), *heads])
    for (layer, site), one in own.astype({"layer": str, "site": str}).groupby(["layer", "site"]):
        values = {row["metric"]: tables.interval(row["value"], row["lo"], row["hi"]) for _, row in one.iterrows()}
        first = cell(int(str(layer))) if str(layer).isdigit() else cell(layer)
        made.rows.append([first, cell(site), *(values.get(name, cell(None)) for name in metrics)])
    made.rows.sort(key=lambda row: (row[0].key.rjust(6), row[1].key != "all", row[1].key))
    curve, variant, protocol, gates, mask, delta = map(str, condition)
    made.note = f"{curve} {variant}, protocol {protocol}, gates {gates}, mask {mask}, weight delta {delta}."
    return made


def curves(path: Path) -> list[figures.Panel]:
    """A panel for each quantity that training logged, over steps; the loss and what is on average active first."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError):
        return []
    names = list(dict.fromkeys(name for line in lines for name in line if name not in NOT_CURVES))
    names.sort(key=lambda name: (name != "loss", name != "l0"))
    panels = []
    for name in names:
        points = [(float(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), (int, float)) and "step" in line]
        panel = figures.curve(name, [x for x, _ in points], [y for _, y in points])
        panels += [panel] if panel else []
    return panels


# ---- components


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    """What was stored, as the template wants it: histograms as panels, contexts as shaded pieces."""
    sites = []
    for site in found["sites"]:
        panel = figures.histogram("Components by density", site["densities"], ("0.000001", "1"))
        shown = [{**one, "contexts": [context(given, one["peak"]) for given in one["contexts"]]} for one in site["components"]]
        sites.append({**site, "panel": panel, "components": shown})
    return {**found, "sites": sites, "shown": sum(len(site["components"]) for site in sites), "all": sum(site["n"] for site in sites)}


def context(given: dict[str, Any], peak: float) -> dict[str, Any]:
    """A stretch of text as pieces; neighbouring tokens where the component is off are one piece."""
    pieces: list[Piece] = []
    for place, (token, value) in enumerate(zip(given["tokens"], given["values"], strict=True)):
        text, shade = visible(token), _shade(value, peak)
        if place == given["at"]:
            pieces.append(Piece(text, f"{shade} peak".strip(), number(value)))
        elif not shade and pieces and not pieces[-1].shade:
            pieces[-1] = pieces[-1]._replace(text=pieces[-1].text + text)
        else:
            pieces.append(Piece(text, shade, number(value) if shade else ""))
    return {"value": given["value"], "from": given["from"], "pieces": pieces}


def _shade(value: float, peak: float) -> str:
    if not value or not peak:
        return ""
    return f"{'u' if value > 0 else 'd'}{min(LEVELS, math.ceil(LEVELS * abs(value) / peak))}"
