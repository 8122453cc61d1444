"""sparsify: its SparseCoder under Adam, in the order of its Trainer's step (which needs a language model)."""

import contextlib

import torch
from loop import serve
from sparsify import SparseCoder, SparseCoderConfig


class Sparsify:
    def __init__(self, job, rows):
        config = SparseCoderConfig(activation=job["architecture"], num_latents=job["features"], k=job["k"])
        self.sae = SparseCoder(job["width"], config)
        self.sae.b_dec.data = rows.held_out().mean(0)
        lr = job["lr"] or 2e-4 / (job["features"] / 2**14) ** 0.5
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=lr)
        self.fired = torch.zeros(job["features"], dtype=torch.long)
        self.bf16 = job["precision"] == "bf16"

    def step(self, x):
        self.sae.set_decoder_norm_to_unit_norm()
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            out = self.sae(x)
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            self.fired += len(x)
            self.fired[out.latent_indices.flatten().unique()] = 0

    def reconstruct(self, x):
        out = self.sae(x)
        return out.sae_out, float((out.latent_acts > 0).float().sum(-1).mean())


if __name__ == "__main__":
    serve(Sparsify)
