"""How fast a cross-layer transcoder trains beside one transcoder a layer of the same size, on the same activations, in one process."""

import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from decomp_bench.config import DataConfig, TrainConfig, parse
from decomp_bench.data import source
from decomp_bench.data.streams import ActivationStream
from decomp_bench.registry import method
from decomp_bench.targets import load
from decomp_bench.train import Job, Training

METHODS = ("transcoder", "clt")


class OneBatch:
    """Serves the same rows at every step: reading them is no part of the rate."""

    def __init__(self, stream: ActivationStream) -> None:
        self._stream, self._batch = stream, stream.batch(0)

    def stream(self, _decomposer) -> ActivationStream:
        return self._stream

    def batch(self, *_args):
        return self._batch


def cross_layer(features: int, k: int, batch: int, steps: int, turns: int, threads: int) -> pd.DataFrame:
    """CPU seconds of a step of each, the least and the median of alternating turns, all layers of pydocs-4l together."""
    torch.set_num_threads(threads)
    target = load("pydocs-4l")
    layers = tuple(range(target.layers))
    points = {f"{layer}.mlp.{end}" for layer in layers for end in ("in", "out")}
    rows = OneBatch(ActivationStream(source(target, DataConfig()), points, batch))
    runs = {name: _started(name, {"features": features, "k": k, "batch": batch, "steps": 10**6}, target, layers, rows) for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, training in runs.items():
            began = time.process_time()
            for _ in range(steps):
                training.advance()
            if turn:  # the first warms up
                seconds[name].append((time.process_time() - began) / steps)
    table = pd.DataFrame(
        {"method": name, "layers": len(layers), "features": features, "k": k, "batch": batch, "seconds": min(found),
         "median": sorted(found)[len(found) // 2]} for name, found in seconds.items()
    )  # fmt: skip
    return table.assign(rate_beside_transcoders=table["seconds"].iloc[0] / table["seconds"])


def _started(name: str, config: dict, target, layers: tuple[int, ...], rows: OneBatch) -> Training:
    kind = method(name)
    decomposer = kind(parse(kind.Config, config, "016"), target, layers)
    quiet = TrainConfig(log_every=10**9, save_every=10**9, precision="fp32")
    training = Training(Job(decomposer, Path(tempfile.mkdtemp())), rows, quiet, torch.device("cpu"))  # type: ignore[arg-type]
    training.start(False)
    training.flops_a_step = 1.0  # counting takes a step of its own
    return training
