"""Alternating turns of training steps: this project's dictionaries beside other libraries', on the same activations in one run."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from decomp_bench.config import parse
from decomp_bench.files import write_json
from decomp_bench.provenance import git_state, hardware

from .cross_layer import cross_layer
from .environments import python_of
from .figure import draw
from .libraries import ARCHITECTURES, OURS, Settings, Worker, job_of
from .quality import Quality, best


def main(settings: dict, folder: Path) -> None:
    """Measure, write rates.csv, quality.csv, machine.json and the figure, and print both tables."""
    chosen = parse(Settings, settings, "016 settings")
    about = {"settings": chosen.model_dump(), "torch": torch.__version__, "hardware": hardware(), **git_state()}
    if chosen.cross_layer_features:
        found = cross_layer(chosen.cross_layer_features, chosen.k, chosen.batch, chosen.steps, chosen.turns, chosen.threads)
        found.to_csv(folder / "cross_layer.csv", index=False)
        write_json(about, folder / "machine.json")
        print(found.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
        return
    libraries = [OURS, *chosen.peers]
    pythons = {name: python_of(name) for name in libraries}
    with tempfile.TemporaryDirectory() as temporary:
        activations = Path(temporary) / "activations.npy"
        np.save(activations, planted(chosen))
        gemm = gemm_rate(chosen)
        rates = pd.concat([speed(name, libraries, pythons, chosen, activations) for name in chosen.architectures], ignore_index=True)
        encoder = 2 * chosen.batch * chosen.width * chosen.features / gemm
        rates["gemm_share"] = encoder / rates["seconds"]
        rates.to_csv(folder / "rates.csv", index=False)
        write_json({**about, "gemm_flops_per_s": gemm}, folder / "machine.json")
        table = summary(rates, chosen)
        table.to_csv(folder / "summary.csv", index=False)
        print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
        if chosen.quality_steps:
            found = Quality(pythons, chosen, activations, folder / "quality.csv").compare(libraries)
            print(best(found).to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    draw(table, chosen.model_dump(), folder)


def planted(chosen: Settings) -> np.ndarray:
    """Rows that are sparse sums of Zipf-frequent directions in superposition, with a little noise."""
    draws = np.random.default_rng(0)
    n = 8 * chosen.width
    directions = draws.standard_normal((n, chosen.width)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    often = 1 / np.arange(1, n + 1) ** 0.8
    often = np.minimum(0.5, often * 0.75 * chosen.k / often.sum())
    rows = []
    for start in range(0, chosen.rows, 4096):
        size = min(4096, chosen.rows - start)
        on = draws.random((size, n), dtype=np.float32) < often
        strength = on * (0.5 + draws.standard_exponential((size, n), dtype=np.float32))
        rows.append(strength @ directions + 0.05 * draws.standard_normal((size, chosen.width)).astype(np.float32))
    return np.concatenate(rows).astype(np.float32)


def gemm_rate(chosen: Settings) -> float:
    """FLOP/s of this machine's own fp32 product of the encoder's shape, best of ten."""
    torch.set_num_threads(chosen.threads)
    a, b = torch.randn(chosen.batch, chosen.width), torch.randn(chosen.width, chosen.features)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * chosen.batch * chosen.width * chosen.features / min(times)


def speed(architecture: str, libraries: list[str], pythons: dict, chosen: Settings, activations: Path) -> pd.DataFrame:
    """Seconds a step of every library that has the architecture: one row for each turn; turns alternate."""
    total = 100 * (chosen.warmup + chosen.turns * chosen.steps)  # so that nothing of a run's end falls into a turn
    having = [name for name in libraries if architecture in ARCHITECTURES[name]]
    workers = {name: Worker(name, pythons[name], job_of(chosen, architecture, activations, total)) for name in having}
    rows = []
    try:
        for worker in workers.values():
            worker.ask(f"train {chosen.warmup}")
        for turn in range(chosen.turns):
            for name in having if turn % 2 == 0 else having[::-1]:
                cost = workers[name].ask(f"train {chosen.steps}")
                seconds = (cost["cpu"] if chosen.threads == 1 else cost["wall"]) / chosen.steps
                row = {"architecture": architecture, "library": name, "turn": turn, "seconds": seconds, "memory_mb": cost["memory_mb"]}
                rows.append(row)
                print(f"{architecture:12} turn {turn + 1}/{chosen.turns}  {name:20} {chosen.batch / seconds:10,.0f} tokens/s", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return pd.DataFrame(rows)


def summary(rates: pd.DataFrame, chosen: Settings) -> pd.DataFrame:
    """Rates from the fastest turn, and how many times faster this project is, as the median over turns of paired ratios."""
    rows = []
    for (architecture, library), own in rates.groupby(["architecture", "library"], sort=False):
        ours = rates[(rates["architecture"] == architecture) & (rates["library"] == OURS)].set_index("turn")["seconds"]
        ratio = (own.set_index("turn")["seconds"] / ours).quantile([0.0, 0.5, 1.0]).tolist() if len(ours) else [float("nan")] * 3
        fastest = own["seconds"].min()
        rows.append({"architecture": architecture, "library": library, "tokens_per_s": chosen.batch / fastest, "ms_per_step": 1e3 * fastest,
                     "gemm_share": own["gemm_share"].max(), "memory_mb": own["memory_mb"].max(),
                     "ours_times_faster": ratio[1], "least": ratio[0], "most": ratio[2]})
    return pd.DataFrame(rows)
