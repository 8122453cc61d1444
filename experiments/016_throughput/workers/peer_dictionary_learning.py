"""dictionary_learning: its trainers' own update."""

import contextlib

import torch
from dictionary_learning.trainers import BatchTopKTrainer, GatedSAETrainer, JumpReluTrainer, StandardTrainer, TopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from loop import serve

TRAINERS = {
    "batchtopk": BatchTopKTrainer, "topk": TopKTrainer, "relu": StandardTrainer, "jumprelu": JumpReluTrainer, "gated": GatedSAETrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
}


class DictionaryLearning:
    def __init__(self, job, rows):
        name = job["architecture"]
        options = {"steps": job["total"], "activation_dim": job["width"], "dict_size": job["features"], "layer": 0, "lm_name": "given",
                   "warmup_steps": min(1000, job["total"] // 10), "device": "cpu", "seed": job["seed"]}
        if name in ("batchtopk", "topk", "matryoshka"):
            options["k"] = job["k"]
        if name == "matryoshka":
            options["group_fractions"] = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
        if name in ("relu", "jumprelu", "gated"):
            options["sparsity_warmup_steps"] = min(2000, job["total"] // 10)
        if job["lr"]:
            options["lr"] = job["lr"]
        self.name, self.trainer, self.done = name, TRAINERS[name](**options), 0
        self.bf16 = job["precision"] == "bf16"

    def step(self, x):
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            self.trainer.update(self.done, x)
        self.done += 1

    def reconstruct(self, x):
        sae = self.trainer.ae
        codes = sae.encode(x, use_threshold=False) if self.name in ("batchtopk", "topk", "matryoshka") else sae.encode(x)
        return sae.decode(codes), float((codes > 0).float().sum(-1).mean())


if __name__ == "__main__":
    serve(DictionaryLearning)
