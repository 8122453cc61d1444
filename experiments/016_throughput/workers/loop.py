"""What every worker does: read a job, train when told, and say what it cost.

Needs numpy and torch alone, since peers run it in environments of their own.

Protocol: the job is a JSON file named on the command line; lines on standard input are `train N`, `score` and `quit`; every answer is
one JSON line on standard output that begins with `@`.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch


class Rows:
    """Batches of the activations on disk: the same rows in the same order for every worker."""

    def __init__(self, job):
        self.all = np.load(job["activations"], mmap_mode="r")
        self.batch, self.held = job["batch"], job["held_out"]
        self.next = 0

    def step(self):
        usable = len(self.all) - self.held
        start = (self.next * self.batch) % (usable - self.batch + 1)
        self.next += 1
        return torch.from_numpy(np.array(self.all[start : start + self.batch]))

    def held_out(self):
        return torch.from_numpy(np.array(self.all[-self.held :]))


def fvu(x, y):
    """Share of the variance of x that y leaves unexplained, summed in double precision."""
    x, y = x.double(), y.double()
    return float((x - y).square().sum() / (x - x.mean(0)).square().sum())


def peak_memory():
    """Peak memory of this process in MB; ru_maxrss, where there is no /proc, begins at that of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(make):
    """Run the protocol for what `make(job, rows)` returns: an object with step(x) and reconstruct(x) -> (y, mean active)."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    rows = Rows(job)
    worker = make(job, rows)
    answer({"ready": True, "torch": torch.__version__})
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "train":
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(int(rest[0])):
                worker.step(rows.step())
            answer({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "memory_mb": peak_memory()})
        elif command == "score":
            x = rows.held_out()
            with torch.no_grad():
                y, active = worker.reconstruct(x)
            answer({"fvu": fvu(x, y), "l0": active})
        else:
            break


def answer(data):
    """One line for the program that started this one; libraries may print what they like besides."""
    print("@" + json.dumps(data), flush=True)
