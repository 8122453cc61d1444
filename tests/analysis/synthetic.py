"""Synthetic results: frontiers of a known shape under every protocol and gate source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from decomp_bench import results

PROTOCOLS = ("cascading", "clean", "single")
METRICS = ("l0_mlp", "l0_module", "active_params", "bits", "ce_delta", "kl", "fvu")
WORSE = {"cascading": 1.6, "clean": 1.0, "single": 0.3}
# family: (scale of the loss, parameters per component, kind, trainable, how much worse its own gates are)
FAMILIES = {
    "clt": (1.1, 320.0, "replacement", True, 1.15),
    "neurons": (3.0, 256.0, "replacement", False, 1.0),
    "random_directions": (2.6, 256.0, "replacement", True, 1.0),
    "random_directions ae": (2.2, 256.0, "autoencoding", True, 1.0),
    "sae": (0.7, 256.0, "autoencoding", True, 1.0),
    "spd init=neuron": (1.5, 640.0, "replacement", True, 2.0),
    "spd init=random": (2.0, 640.0, "replacement", True, 2.4),
    "svd": (3.6, 640.0, "replacement", False, 1.1),
    "svd pca": (2.4, 128.0, "autoencoding", False, 1.0),
    "transcoder": (1.0, 256.0, "replacement", True, 1.1),
}


def row(**values) -> dict:
    """One results row with plain conditions."""
    plain = {
        "run_id": "run",
        "method": "method",
        "family": "family",
        "kind": "replacement",
        "trainable": True,
        "variant": "k=8",
        "curve": "trained",
        "target": "pydocs-4l",
        "target_hash": "3f" * 16,
        "dataset": "pydocs",
        "token_hash": "ab" * 16,
        "split": "test",
        "seed": 0,
        "layers": "0,1,2,3",
        "layer": "all",
        "site": "all",
        "protocol": "clean",
        "gates": "clean",
        "mask": "binary",
        "delta": "off",
        "init": "",
        "base": "",
        "positions": "1:",
        "metric": "ce_delta",
        "metric_version": 1,
        "n": 312_448,
        "applicable": "yes",
        "reason": "",
        "converged": "yes",
        "step": 4000,
    }
    return plain | values


def point(x: float, y: float, spread: float = 0.05, metrics: tuple[str, str] = ("active_params", "ce_delta"), **values) -> list[dict]:
    """The two rows that place one point, with relative document intervals of `spread`."""
    ends = [
        {"metric": metric, "value": value, "lo": value * (1 - spread), "hi": value * (1 + spread)}
        for metric, value in zip(metrics, (x, y), strict=True)
    ]
    return [row(**values, **end) for end in ends]


def line(family: str, xs: Iterable[float], ys: Iterable[float], **values) -> list[dict]:
    """A trained curve through these points, one run each."""
    rows = []
    for index, (x, y) in enumerate(zip(xs, ys, strict=True)):
        rows += point(x, y, **({"family": family, "variant": f"k={index}", "run_id": f"{family}-{index}"} | values))
    return rows


def _run(family: str, k: int, seed: int, curve: str, trained_k: int, random: np.random.Generator) -> Iterator[dict]:
    scale, size, kind, trainable, own = FAMILIES[family]
    jitter = math.exp(0.05 * random.standard_normal()) if trainable else 1.0
    l0 = k * math.exp(0.02 * random.standard_normal() * trainable)
    penalty = 1 + 0.25 * abs(math.log2(k / trained_k))
    for protocol in PROTOCOLS:
        for gates in ("clean", "self"):
            times = own if gates == "self" and protocol == "cascading" else 1.0
            ce = 0.5 * scale * k**-0.55 * jitter * penalty * WORSE[protocol] * times
            values = {"ce_delta": ce, "kl": ce * 1.05, "fvu": min(0.95, 0.9 * ce**0.5)}
            values |= {"l0_mlp": l0, "l0_module": l0 / 2, "active_params": l0 * size, "bits": l0 * (9 + math.log2(scale + 8))}
            for metric in METRICS:
                yield row(
                    run_id=f"{family}-{trained_k}-{seed}",
                    family=family,
                    kind=kind,
                    trainable=trainable,
                    variant=f"k={k}" if curve == "trained" else f"k={k} of k={trained_k}",
                    curve=curve,
                    seed=seed,
                    protocol=protocol,
                    gates=gates,
                    metric=metric,
                    value=values[metric],
                    lo=values[metric] * 0.95,
                    hi=values[metric] * 1.05,
                    converged="no" if family == "spd init=random" and trained_k >= 32 else "yes",
                )


def realistic(seeds: int = 3, ks: tuple[int, ...] = (4, 8, 16, 32, 64, 128), sweeps: bool = True) -> pd.DataFrame:
    """Every family at every k and seed, with inference sweeps of each checkpoint."""
    random, rows = np.random.default_rng(0), []
    for family in FAMILIES:
        for k in ks:
            for seed in range(seeds):
                rows += _run(family, k, seed, "trained", k, random)
                if sweeps and FAMILIES[family][3]:
                    for other in (k // 4, k // 2, k * 2, k * 4):
                        rows += _run(family, other, seed, "inference", k, random)
    return results.frame(rows)
