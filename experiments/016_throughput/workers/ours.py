"""decomp-bench: the SAE of this project in its own training loop, on rows given."""

import tempfile
from pathlib import Path

import torch
from loop import serve
from torch import nn

from decomp_bench.config import TrainConfig, parse
from decomp_bench.decomposer import Batch
from decomp_bench.registry import method
from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.train import Job, Training

POINT = "0.mlp.out"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Identity()


class Given(nn.Module):
    """A target of one layer that computes nothing: its activations are given."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.place = nn.Parameter(torch.zeros(1))


class Stream:
    """Serves the rows as the training loop's stream."""

    def __init__(self, rows, warm):
        self.rows, self.warm, self.now = rows, warm, None

    def stream(self, _decomposer):
        return self

    def batch(self, *_args):
        return Batch(clean={POINT: self.now if self.now is not None else self.warm})


class Ours:
    def __init__(self, job, rows):
        target = TargetModel("given", Given(), Architecture("blocks.{}", "blocks.{}.mlp", None, {}), 1, job["width"], "regression")
        config = {"features": job["features"], "activation": job["architecture"], "batch": job["batch"], "steps": job["total"]}
        config |= {} if job["architecture"] in ("relu", "jumprelu", "gated") else {"k": job["k"]}
        config |= {"lr": job["lr"]} if job["lr"] else {}
        kind = method("sae")
        self.decomposer = kind(parse(kind.Config, config, "016"), target, (0,), job["seed"])
        self.stream = Stream(rows, rows.held_out())
        folder = Path(tempfile.mkdtemp())
        train = TrainConfig(precision=job["precision"], threads=job["threads"], log_every=10**9, save_every=10**9)
        self.training = Training(Job(self.decomposer, folder), self.stream, train, torch.device("cpu"))
        self.training.start(False)
        self.training.flops_a_step = 1.0  # counting takes a step of its own

    def step(self, x):
        self.stream.now = x
        self.training.advance()
        self.stream.now = None

    def reconstruct(self, x):
        self.decomposer.eval()
        codes = self.decomposer.encode({POINT: x})
        y = self.decomposer.decode(codes, POINT, {POINT: x})
        return y, float(codes["0"].active.float().sum(-1).mean())


if __name__ == "__main__":
    serve(Ours)
