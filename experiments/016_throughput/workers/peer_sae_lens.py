"""sae-lens: its SAETrainer's own step."""

from loop import serve
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

NAMES = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}


class SAELens:
    def __init__(self, job, rows):
        name = NAMES.get(job["architecture"], job["architecture"])
        kind, config = get_sae_training_class(name)
        options = {"d_in": job["width"], "d_sae": job["features"]}
        if name in ("topk", "batchtopk", "matryoshka_batchtopk"):
            options["k"] = job["k"]
        if name == "matryoshka_batchtopk":
            options["matryoshka_widths"] = [job["features"] // n for n in (16, 8, 4, 2, 1)]
        self.rows, self.sae = rows, kind(config(**options))
        lr = job["lr"] or 3e-4
        trainer = SAETrainerConfig(
            total_training_samples=job["total"] * job["batch"], train_batch_size_samples=job["batch"], lr=lr, lr_end=lr / 10,
            autocast=job["precision"] == "bf16",
        )
        self.trainer = SAETrainer(trainer, self.sae, iter(()))

    def step(self, x):
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x):
        # at the k of the training step: its inference threshold is a moving average that starts at zero
        self.sae.train()
        codes, _ = self.sae.encode_with_hidden_pre(x)
        dense = codes.to_dense() if codes.is_sparse else codes
        return self.sae.decode(codes), float((dense > 0).float().sum(-1).mean())


if __name__ == "__main__":
    serve(SAELens)
