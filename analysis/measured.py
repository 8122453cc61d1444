"""Rows of measurements (NAME.parquet) as points over all concepts (components, layers): mean over seeds, intervals, what is left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from decomp_bench.results import unfolded

from .intervals import describe, over_seeds
from .points import tidy
from .style import MARKERS, SIZES, Style, styles

BASELINE = "baseline"
TITLES = {"replacement": "Replacement", "autoencoding": "Autoencoding (sees y)", "floor": "Floors", BASELINE: "Baselines"}
ENTRY = ["family", "kind", "trainable", "form"]
BASELINE_MARKERS = "PX*<>8"
SHOWN = ("component", "baseline")
"""Ways that are drawn, beside those of random controls; of others there are rows alone."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
COMMON = ("target", "target_hash", "dataset", "token_hash", "layers", "protocol")


@dataclass(frozen=True)
class Measurements:
    """A measurement's rows over all concepts (or whatever `each` names), and what a caption says of them.

    `data` has the columns of `ENTRY`, `control` (whether a row is of random components or directions), `over`, `at` (a factor or damage, or
    `chosen`), metric, mean, lo, hi and seeds.
    """

    data: pd.DataFrame
    facts: dict[str, str]
    left_out: list[str]
    known: pd.DataFrame
    """The entries that there are rows of, those without a value too, so that a family looks the same in every figure of an experiment."""
    each: str = "concept"
    settings: dict[str, str] = field(default_factory=dict)
    """Family -> the setting in its name, of families that are one of several settings (`points.variants_apart`); the smallest first."""

    def of(self, metric: str, over: str, control: bool = False, at: str | None = None) -> pd.DataFrame:
        """The points of a metric, indexed by entry where one place is asked for."""
        data = self.data
        data = data[(data["metric"] == metric) & (data["over"] == over) & (data["control"] == control)]
        return data if at is None else data[data["at"] == at].set_index(ENTRY)


def read(frame: pd.DataFrame, at: str, each: str = "concept") -> Measurements:
    """From a measurement's frame; `at` is the key of the conditions that its curves go along, `each` that of what they are a mean over.

    Raises ValueError with one line.
    """
    data = unfolded(tidy(frame))
    whole = data[data[each] == "all"] if each in data else data[:0]
    if whole.empty:
        raise ValueError(f"nothing over all {each}s to draw: no {each} could be measured")
    whole = whole[whole["way"].isin(SHOWN) | whole["way"].str.startswith("random")]
    facts = {}
    for column in COMMON:
        values = sorted(set(map(str, whole[column])))
        if len(values) > 1:
            raise ValueError(f"rows of different {column} ({', '.join(values[:4])}) cannot share axes: keep one")
        facts[column] = values[0]
    whole = whole.assign(control=whole["way"].str.startswith("random"), at=whole[at], base="")
    by = [*ENTRY, "control", "over", "at", "metric"]
    points = over_seeds(whole, by, "value", "lo", "hi").reset_index()
    counts = whole.groupby("over")["n"].max()
    facts |= {f"n_{over}": str(int(count)) for over, count in counts.items()}
    facts["gates"] = " or ".join(sorted(set(whole["gates"])))
    facts["seeds"] = describe(points["seeds"].tolist()).removeprefix("95% document bootstrap, ")
    measured = data[~data[each].isin(["all", ""]) & data["value"].notna() & (data["way"] != "")]
    facts[f"{each}s"] = ", ".join(dict.fromkeys(measured[each]))
    known = points[ENTRY].drop_duplicates()
    return Measurements(points.dropna(subset=["mean"]), facts, _left_out(data, whole, each), known, each, _settings(whole))


def _settings(whole: pd.DataFrame) -> dict[str, str]:
    if "setting" not in whole:
        return {}
    pairs = whole[whole["setting"] != ""][["family", "setting"]].drop_duplicates().itertuples(index=False)
    ordered = sorted(sorted(map(tuple, pairs)), key=lambda pair: [float(number) for number in NUMBER.findall(pair[1])])
    return {str(family): str(setting) for family, setting in ordered}


def _left_out(data: pd.DataFrame, whole: pd.DataFrame, each: str) -> list[str]:
    """Concepts that could not be measured, and families of which nothing could be, with their reasons."""
    missing = data[data["value"].isna() & (data["reason"] != "")]
    of_concepts = missing[(missing[each] != "all") & (missing["kind"] == BASELINE) & (missing.get("sort", "") != "")]
    nothing = missing[(missing[each] == "all") & ~missing["family"].isin(whole[whole["value"].notna()]["family"])]
    named = [*zip(of_concepts[each], of_concepts["reason"], strict=True), *zip(nothing["family"], nothing["reason"], strict=True)]
    return list(dict.fromkeys(f"{name}: {reason.removeprefix('left out: ')}" for name, reason in named))


def group_of(kind: str, trainable: bool) -> str:
    """The group that an entry stands in."""
    return BASELINE if kind == BASELINE else "floor" if not trainable else "autoencoding" if kind == "autoencoding" else "replacement"


def without(setting: str, label: str) -> str:
    """A label without the setting that is in it, if any."""
    return label.replace(f", {setting}", "", 1) if setting else label


def looks(found: Measurements) -> dict[tuple[str, str], Style]:
    """(family, kind) -> style: of families as in every figure, of baselines grey with markers of their own.

    Settings of one family have its colour, each the same marker in every family; families of one setting share a marker beside them.
    """
    known = found.known
    own = known[known["kind"] != BASELINE]
    plain = own.assign(family=[without(found.settings.get(str(name), ""), str(name)) for name in own["family"]])
    of_families = styles(plain) if len(own) else {}
    *of_settings, other = MARKERS["replacement"]
    markers = dict(zip(dict.fromkeys(found.settings.values()), itertools.cycle(of_settings)))
    made = {}
    for name, family, kind in zip(own["family"], plain["family"], own["kind"], strict=True):
        look, setting = of_families[str(family), str(kind)], found.settings.get(str(name), "")
        marker = markers.get(setting, other) if markers else look.marker
        made[str(name), str(kind)] = replace(look, label=f"{look.label}, {setting}" if setting else look.label, marker=marker)
    for place, family in enumerate(sorted(set(known[known["kind"] == BASELINE]["family"]))):
        marker = BASELINE_MARKERS[place % len(BASELINE_MARKERS)]
        made[family, BASELINE] = Style(family, BASELINE, "#222222", "#999999", marker, SIZES.get(marker, 1.0))
    return made


def label_of(entry: tuple, entries: pd.DataFrame | pd.MultiIndex) -> str:
    """The family, with the form where it has several."""
    family, kind, _, form = entry
    table = entries.to_frame(index=False) if isinstance(entries, pd.MultiIndex) else entries[ENTRY]
    several = len(set(table[(table["family"] == family) & (table["kind"] == kind)]["form"])) > 1
    return f"{family}, {form}" if several else str(family)


def conditions(found: Measurements, units: str, extra: str = "") -> str:
    """The sentences of a caption that say on what, under what protocol and with what intervals."""
    facts = found.facts
    out = f" Left out: {'; '.join(found.left_out)}." if found.left_out else ""
    return (
        f"Target {facts['target']} ({facts['target_hash'][:8]}), layers {facts['layers']}; {facts['dataset']} "
        f"(tokens {facts['token_hash'][:8]}). "
        f"Protocol {facts['protocol']}, gates {facts['gates']}, reconstruction error kept.{extra} "
        f"Concepts: {facts.get('n_concepts', '0')} ({facts['concepts']}), {facts.get(f'n_{units}', '0')} {units}. "
        f"Intervals: 95% bootstrap over concepts and over {units}; {facts['seeds']}.{out}"
    )


def summary(found: Measurements, metric: str, gain: str, at: str, over: str = "concepts") -> list[Mapping[str, object]]:
    """One row for each entry at one place: the metric, that of its random controls, and the gain with its interval."""
    own, control, gains = found.of(metric, over, False, at), found.of(metric, over, True, at), found.of(gain, over, False, at)
    rows = []
    for entry in ordered(own):
        row: dict[str, object] = {"family": entry[0], "form": entry[3], metric: _number(own.loc[entry])}
        row["random"] = f"{control.loc[entry]['mean']:.3g}" if entry in control.index else "-"
        row["gain"] = _number(gains.loc[entry]) if entry in gains.index else "-"
        rows.append(row)
    return rows


def _number(row: pd.Series) -> str:
    return f"{row['mean']:.3g} [{row['lo']:.3g}, {row['hi']:.3g}]" if np.isfinite(row["lo"]) else f"{row['mean']:.3g}"


def ordered(own: pd.DataFrame) -> list[tuple]:
    """Entries by group, the largest first."""
    places = {name: i for i, name in enumerate(TITLES)}
    return sorted(own.index, key=lambda entry: (places[group_of(entry[1], entry[2])], -float(own.loc[entry]["mean"])))
