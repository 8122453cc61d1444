"""Reseed noise: how far runs of one config fall apart by their seed alone, and which differences that lets anyone resolve."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from .intervals import t_quantile
from .model_table import FIDELITY, HEADLINE, KEYS, Manifests, setup
from .points import PROTOCOLS, tidy

CONDITION = ["metric", "base", "protocol", "gates"]
EVERY = "all"
"""The family under which those of every trained family are pooled."""
COLUMNS = [
    *KEYS, *CONDITION, "family", "mean", "sd", "sd_lo", "sd_hi", "document_half_width", "resolved_1", "resolved_3", "configs", "runs",
    "degrees",
]  # fmt: skip


def seed_noise(frame: pd.DataFrame, manifests: Manifests | None = None) -> pd.DataFrame:
    """
    One row for each metric, protocol, gate source and trained family, and one for all families together (`family` = all).

    Runs that differ in their seed only are one config; configs with one seed are left out, as is what was not trained. Columns: KEYS,
    CONDITION; `mean` of the values; `sd` over seeds, pooled within configs, with the ends of its 95% interval (chi-square, for normal
    noise); `document_half_width`, the mean half width of the document bootstrap of one run; `resolved_1` and `resolved_3`, the smallest
    difference of two single runs and of two means of three seeds, scored on the same tokens, that seeds alone pass in one case of twenty:
    t(degrees) sd sqrt(2 / seeds); the numbers of configs, runs and degrees of freedom (runs - configs). Documents are shared by both
    sides, so that their noise within a seed is in `sd` already, and what it adds to a difference of two configs is for a paired
    bootstrap. Empty where no config has two seeds. Raises ValueError where one config has two runs of a seed.
    """
    data = _runs(frame, manifests or {})
    if data.empty:
        return pd.DataFrame(columns=COLUMNS)
    pooled = pd.concat([data, data.assign(family=EVERY)], ignore_index=True)
    made = pd.DataFrame([_row(key, own) for key, own in pooled.groupby([*KEYS, *CONDITION, "family"])])[COLUMNS]
    order = {name: place for place, name in enumerate((*PROTOCOLS, *sorted(set(made["protocol"]) - set(PROTOCOLS))))}
    made = made.assign(place=made["protocol"].map(order), each=made["family"] != EVERY)
    made = made.sort_values([*KEYS, "metric", "base", "place", "gates", "each", "family"], kind="stable", ignore_index=True)
    return made.drop(columns=["place", "each"])


def _runs(frame: pd.DataFrame, manifests: Manifests) -> pd.DataFrame:
    """The whole-model values of trained runs as they were trained, of configs with several seeds."""
    data = tidy(frame)
    data = data[data["trainable"] & (data["curve"] == "trained") & (data["mask"] == "binary") & (data["delta"] == "off")]
    data = data[(data["layer"] == "all") & (data["site"] == "all") & (data["applicable"] != "no") & np.isfinite(data["value"])]
    if data.empty:
        return data
    own = ["family", "kind", "variant", "condition"]
    setups = {run: setup(run, manifests) for run in data["run_id"].unique() if run in manifests}
    data = data.assign(setup=data["run_id"].map(setups).fillna(data[own].agg("; ".join, axis=1)))
    config = [*KEYS, *CONDITION, "setup"]
    if data.duplicated([*config, "seed"]).any():
        twice = data[data.duplicated([*config, "seed"])].iloc[0]
        raise ValueError(f"two runs of {twice['family']}, {twice['variant']} have seed {twice['seed']}: keep one in the results")
    return data[data.groupby(config)["seed"].transform("size") > 1]


def _row(key: tuple, own: pd.DataFrame) -> dict[str, object]:
    groups = own.groupby("setup")["value"]
    runs, configs = len(own), groups.ngroups
    degrees = runs - configs
    sd = math.sqrt(float((groups.var(ddof=1) * (groups.size() - 1)).sum()) / degrees)
    lo, hi = sd_interval(sd, degrees)
    half = float(((own["hi"] - own["lo"]) / 2).mean())
    single = t_quantile(degrees) * sd * math.sqrt(2)
    about = dict(zip([*KEYS, *CONDITION, "family"], key, strict=True))
    about |= {"mean": own["value"].mean(), "sd": sd, "sd_lo": lo, "sd_hi": hi, "document_half_width": half}
    return about | {"resolved_1": single, "resolved_3": single / math.sqrt(3), "configs": configs, "runs": runs, "degrees": degrees}


def sd_interval(sd: float, degrees: int) -> tuple[float, float]:
    """The 95% interval of a standard deviation that was estimated with so many degrees of freedom from normal values."""
    from scipy.special import chdtri

    lo, hi = (sd * math.sqrt(degrees / float(chdtri(degrees, share))) for share in (0.025, 0.975))
    return lo, hi


def noise_markdown(noise: pd.DataFrame) -> str:
    """What `seed_noise` found, for reading: every metric over all families, then the families' own for what is compared most."""
    parts = ["# Reseed noise\n", NOTE]
    for key, own in noise.groupby(KEYS, sort=False):
        about = dict(zip(KEYS, key, strict=True))
        parts.append(f"\n## {about['target']}, {about['dataset']} ({str(about['token_hash'])[:8]}), layers {about['layers']}\n")
        for title, shown in (("All trained families together", own[own["family"] == EVERY]), ("Each family", _of_families(own))):
            if len(shown := _once(shown)):
                parts.append(f"### {title}\n\n{_lines(shown)}")
    return "\n".join(parts)


NOTE = """Standard deviation over seeds of the same config, pooled within configs, with its 95% interval; half width of the document
bootstrap of one run; and the smallest difference of two single runs and of two means of three seeds, on the same tokens, that seeds
alone pass in one case of twenty. The noise of different families is pooled in the first table and may differ in the second. Gates that
give the same are shown once; every line is in seed_noise.csv.
"""


def _once(shown: pd.DataFrame) -> pd.DataFrame:
    """Without lines of other gates than clean that say the same as those."""
    numbers = ["mean", "sd", "document_half_width"]
    rounded = shown[numbers].map(digits)
    return shown[~pd.concat([shown[["metric", "base", "protocol", "family"]], rounded], axis=1).duplicated()]


def _of_families(own: pd.DataFrame) -> pd.DataFrame:
    return own[(own["family"] != EVERY) & own["metric"].isin(FIDELITY) & (own["protocol"] == HEADLINE[0]) & (own["gates"] == HEADLINE[1])]


def _lines(shown: pd.DataFrame) -> str:
    several = (shown["family"] != EVERY).any()
    names = ["metric", *(["family"] if several else []), "protocol", "gates"]
    heads = ["mean", "sd", "95%", "documents ±", "1 seed", "3 seeds", "runs"]
    lines = [names + heads, ["---"] * len(names) + ["---:"] * len(heads)]
    for row in shown.itertuples(index=False):
        metric = f"{row.metric}, {row.base}" if row.base and str(row.base) not in str(row.metric) else str(row.metric)
        names = [metric, *([str(row.family)] if several else []), str(row.protocol), str(row.gates), digits(row.mean)]
        ends = f"{digits(row.sd_lo)} to {digits(row.sd_hi)}"
        numbers = [digits(value) for value in (row.document_half_width, row.resolved_1, row.resolved_3)]
        lines.append([*names, digits(row.sd), ends, *numbers, f"{row.runs} of {row.configs}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def digits(value: object) -> str:
    """Two digits of a noise: 0.0012, 0.12, 1.2, 1,200; empty where it is not known."""
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        return ""
    return f"{number:,.0f}" if abs(number) >= 100 else "0" if abs(number) < 1e-6 else f"{number:.2g}"
