"""Alternating turns of training steps of SPD or VPD: straightforward code with one seed, this project with one seed and with several."""

import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from pydantic import PositiveInt

from decomp_bench import data, targets
from decomp_bench.config import Config, DataConfig, TrainConfig, parse
from decomp_bench.data.streams import order
from decomp_bench.decomposer import Decomposer
from decomp_bench.files import write_json
from decomp_bench.provenance import git_state, hardware
from decomp_bench.registry import method
from decomp_bench.stacking import lanes
from decomp_bench.training import Job, Streams, Training

from .plain_lm import PlainLM
from .plain_toy import PlainToy

FOREVER = 10**9


class Settings(Config):
    target: str
    method: str = "spd"
    config: dict
    """The method's own."""
    seeds: PositiveInt
    """Of a toy; a language model's are trained one by one."""
    compile: str
    warmup: PositiveInt
    steps: PositiveInt
    turns: PositiveInt


def main(settings: dict, folder: Path) -> None:
    """Measure, write rates.csv and summary.csv, and print the summary."""
    chosen = parse(Settings, settings, "027 settings")
    torch.set_num_threads(1)
    rates = measure(chosen)
    table = summary(rates)
    rates.to_csv(folder / "rates.csv", index=False)
    table.to_csv(folder / "summary.csv", index=False)
    about = {"settings": chosen.model_dump(), "torch": torch.__version__, "hardware": hardware(), **git_state()}
    write_json(about, folder / "machine.json")
    print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))


def measure(chosen: Settings) -> pd.DataFrame:
    """CPU seconds of a step of each, one row for each turn; turns alternate."""
    target = targets.load(chosen.target)
    source = data.source(target, DataConfig())
    kind = method(chosen.method)
    config = parse(kind.Config, {**chosen.config, "steps": FOREVER}, "027 config")

    def made(seeds: int) -> list[Decomposer]:
        return [kind(config, target, tuple(range(target.layers)), seed) for seed in range(seeds)]

    plain, rows = (PlainLM if target.is_lm else PlainToy)(made(1)[0]), order(source.size("train"), 0, 0)

    def straightforward(step: int) -> None:
        place = step * config.batch % (len(rows) - config.batch + 1)
        x = source.batch("train", rows[place : place + config.batch]).x
        assert x is not None
        plain.step(x)

    ours = {f"{seeds} stacked": started(made(seeds), source, chosen) for seeds in dict.fromkeys((1, chosen.seeds))}
    ways = {"straightforward": straightforward, **{name: lambda _step, lane=lane: lane.advance() for name, lane in ours.items()}}
    found = []
    for turn in range(chosen.turns + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            count, began = chosen.steps if turn else chosen.warmup, time.process_time()
            for step in range(count):
                ways[name](step)
            seconds = (time.process_time() - began) / count
            print(f"turn {turn}  {name:18} {1e3 * seconds:8.2f} ms/step{'' if turn else ', warming up'}", flush=True)
            if turn:
                found.append({"way": name, "seeds": int(name.split()[0]) if name in ours else 1, "turn": turn, "seconds": seconds})
    return pd.DataFrame(found)


def started(members: list[Decomposer], source, chosen: Settings):
    """The runs as the training loop has them, all in one step."""
    quiet = TrainConfig(log_every=FOREVER, save_every=FOREVER, precision="fp32", compile=chosen.compile)  # type: ignore[arg-type]
    streams = Streams(source, members)
    runs = [Training(Job(one, Path(tempfile.mkdtemp())), streams, quiet, torch.device("cpu")) for one in members]
    for run in runs:
        run.start(False)
        run.flops_a_step = 1.0  # counting takes a step of its own
    (lane,) = lanes(runs)
    return lane


def summary(rates: pd.DataFrame) -> pd.DataFrame:
    """The fastest turn of each, and a step's time beside the straightforward one's: the median, least and most of paired turns."""
    plain = rates[rates["way"] == "straightforward"].set_index("turn")["seconds"]
    rows = []
    for (way, seeds), own in rates.groupby(["way", "seeds"], sort=False):
        ratio = plain / own.set_index("turn")["seconds"]
        fastest, usual = 1e3 * own["seconds"].min(), ratio.median()
        row = {"way": way, "ms_per_step": fastest, "ms_per_seed": fastest / seeds, "times_faster": usual}
        rows.append({**row, "least": ratio.min(), "most": ratio.max(), "times_faster_a_seed": usual * seeds})
    return pd.DataFrame(rows)
