"""Mean over seeds and its 95% interval."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
QUANTILES = """
12.7062 4.3027 3.1824 2.7764 2.5706 2.4469 2.3646 2.3060 2.2622 2.2281
2.2010 2.1788 2.1604 2.1448 2.1314 2.1199 2.1098 2.1009 2.0930 2.0860
2.0796 2.0739 2.0687 2.0639 2.0595 2.0555 2.0518 2.0484 2.0452 2.0423
"""
T975 = tuple(float(quantile) for quantile in QUANTILES.split())


def t_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t; beyond the table by two corrections to the normal quantile."""
    if degrees <= len(T975):
        return T975[degrees - 1]
    normal = 1.959964
    first, second = (normal**3 + normal) / 4, (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
    return normal + first / degrees + second / degrees**2


def over_seeds(data: pd.DataFrame, by: list[str], value: str, lo: str, hi: str) -> pd.DataFrame:
    """
    For each group: mean, lo, hi and seeds. One seed: its document interval. Several: at either end the wider of the t interval over
    seeds and the mean document interval, since seeds share their documents and a floor does not vary with the seed at all.
    Rows of one seed are averaged first. An end is NaN where no interval is known.
    """
    columns = [value, lo, hi]
    seeds = data[[*by, "seed", *columns]].replace([np.inf, -np.inf], np.nan).groupby([*by, "seed"])[columns].mean()
    groups = seeds.groupby(level=by)
    mean, count = groups[value].mean(), groups.size()
    factors = [t_quantile(size - 1) / math.sqrt(size) if size > 1 else math.nan for size in count.to_numpy(int).tolist()]
    half = pd.Series(factors, index=count.index, dtype=float) * groups[value].std()
    ends = {"lo": np.fmin(groups[lo].mean(), mean - half), "hi": np.fmax(groups[hi].mean(), mean + half)}
    return pd.DataFrame({"mean": mean, **ends, "seeds": count})


def describe(seeds: list[int]) -> str:
    """What the interval is, for points with these numbers of seeds."""
    few, many = min(seeds), max(seeds)
    count = str(few) if few == many else f"{few} to {many}"
    if many == 1:
        return "95% document bootstrap, 1 seed"
    note = " (descriptive)" if few <= 3 else ""
    single = "; document bootstrap alone where there is 1 seed" if few == 1 else ""
    return f"95%, at each end the wider of t over {count} seeds{note} and document bootstrap{single}"


def together(verdicts: pd.Series) -> str:
    """The convergence of several runs together: no if one has not converged, yes if all have, else unknown."""
    found = set(verdicts)
    return "no" if "no" in found else "yes" if found == {"yes"} else "unknown"
