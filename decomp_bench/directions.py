"""Directions at MLP outputs as components, so that vectors that no decomposition found are steered and ablated like those that one did.

Difference in means and the weights of a linear probe are the usual ones (Marks and Tegmark 2023; Alain and Bengio 2016); ReFT-r1 is the
rank-one representation fine-tuning of AxBench (Wu et al. 2025, arXiv 2501.17148).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.concepts.sample import Sample
from decomp_bench.config import MethodConfig
from decomp_bench.data.streams import positions, with_clean
from decomp_bench.decomposer import Batch, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot, layer_of
from decomp_bench.intervene import Intervention, intervened, one
from decomp_bench.targets.base import TargetModel


class Directions(Decomposer):
    """Unit vectors v at the output of each MLP; a component's strength is v . (y - mean of y), so that zeroing one projects it out."""

    name = "directions"
    summary = "given directions at MLP outputs"
    kind = "autoencoding"
    trainable = False

    @staticmethod
    def of(target: TargetModel, vectors: Mapping[int, Float[Tensor, "n d"]], means: Mapping[int, Float[Tensor, " d"]]) -> Directions:
        """A bank of vectors by layer, brought to unit length."""
        made = Directions(MethodConfig(steps=0), target, tuple(sorted(vectors)))
        for layer, rows in vectors.items():
            point = f"{layer}.mlp.out"
            made.sites.append(Site(point, layer, (point,), (Slot(point, point),), len(rows)))
            made.vectors[str(layer)] = nn.Parameter(rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12), requires_grad=False)
            made.means[str(layer)] = nn.Parameter(means[layer].clone(), requires_grad=False)
        return made.to(target.device).eval()

    def build(self, generator: torch.Generator) -> None:
        self.vectors, self.means = nn.ParameterDict(), nn.ParameterDict()

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        codes: Codes = {}
        for site in self.sites:
            if site.name in inputs:
                strength = (inputs[site.name] - self.means[str(site.layer)]) @ self.vectors[str(site.layer)].T
                codes[site.name] = SiteCodes(strength, gates[site.name].gate if gates else torch.ones_like(strength))
        return codes

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        key = str(layer_of(write))
        return codes[write].value @ self.vectors[key] + self.means[key]

    def component_sizes(self, site: Site) -> int:
        return 2 * self.target.width

    def directions(self, site: Site, slot: Slot) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        vectors = self.vectors[str(site.layer)]
        return vectors, vectors


Outputs = dict[int, Float[Tensor, "tokens d"]]


@torch.no_grad()
def outputs(sample: Sample, layers: Sequence[int], size: int = 16) -> tuple[Outputs, Tensor, Tensor]:
    """MLP outputs at every real position but the first, the row of each, and the concepts that hold there [tokens, c]."""
    source, points = sample.source, {f"{layer}.mlp.out" for layer in layers}
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    row, held = [], []
    for start in range(0, len(sample.index), size):
        batch = with_clean(source, source.batch(sample.split, sample.index[start : start + size]), points, logits=False)
        kept = positions(batch, True)[:, 1:]
        for layer in layers:
            found[layer].append(batch.clean[f"{layer}.mlp.out"][:, 1:][kept].cpu())
        row.append(start + kept.cpu().nonzero()[:, 0])
        held.append(sample.tokens[start : start + size][:, : kept.shape[1]][kept.cpu()])
    return {layer: torch.cat(parts) for layer, parts in found.items()}, torch.cat(row), torch.cat(held)


def mean_difference(y: Float[Tensor, "tokens d"], holds: Tensor) -> Float[Tensor, " d"]:
    """Mean where a concept holds minus mean where it does not."""
    return y[holds].mean(0) - y[~holds].mean(0)


def probe(y: Float[Tensor, "tokens d"], holds: Tensor, most: int = 20_000) -> Float[Tensor, " d"]:
    """Weights of a logistic probe on standardised outputs, in the outputs' own coordinates; classes weigh the same."""
    from sklearn.linear_model import LogisticRegression

    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:most]
    if not 0 < int(holds[chosen].sum()) < len(chosen):
        return mean_difference(y, holds)
    spread = y.std(0).clamp_min(1e-6)
    fitted = LogisticRegression(C=0.1, max_iter=200, class_weight="balanced")
    fitted.fit(((y[chosen] - y.mean(0)) / spread).numpy(), holds[chosen].numpy())
    return torch.from_numpy(fitted.coef_[0]).to(y) / spread


def random_directions_like(mean: Mapping[int, Tensor], n: int, seed: int) -> dict[int, Tensor]:
    """n random directions at each layer, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(n, len(value), generator=generator) for layer, value in mean.items()}


def rank_one_finetuned(
    target: TargetModel,
    sample: Sample,
    concept: int,
    layer: int,
    start: Float[Tensor, " d"],
    mean: Float[Tensor, " d"],
    *,
    steps: int = 60,
    batch: int = 8,
    lr: float = 0.02,
    k: int = 8,
    penalty: float = 5e-3,
    seed: int = 0,
) -> Float[Tensor, " d"]:
    """ReFT-r1: the unit vector w that, added to the MLP's output with the mean of the k largest ReLU(w . (y - mean)) of the row as factor,
    makes the text of the concept most likely; every other activation is penalised by its absolute value.

    Trained on the rows of a sample where the concept holds; it starts at a vector given, such as the difference in means.
    """
    source, generator = sample.source, torch.Generator().manual_seed(seed)
    rows = torch.from_numpy(sample.index)[sample.tokens[..., concept].any(1)]
    bank = Directions.of(target, {layer: start[None]}, {layer: mean})
    w, point = bank.vectors[str(layer)].requires_grad_(True), f"{layer}.mlp.out"
    optimiser = torch.optim.Adam([w], lr=lr)
    for _ in range(steps if len(rows) else 0):
        picked = rows[torch.randint(len(rows), (min(batch, len(rows)),), generator=generator)]
        data = with_clean(source, source.batch(sample.split, picked.numpy()), {point}, logits=False)
        kept = positions(data, True)[:, 1:]
        active = torch.relu((data.clean[point][:, 1:] - bank.means[str(layer)]) @ w[0]) * kept
        top = active.topk(min(k, active.shape[1]), 1)
        amount = top.values.mean(1, keepdim=True)
        logits = intervened(bank, data, Intervention("add", one(point, 0), amount)).logits
        spare = (active.sum() - top.values.sum()) / kept.sum()
        optimiser.zero_grad()
        (_next_token_loss(logits, data) + penalty * spare).backward()
        optimiser.step()
        with torch.no_grad():
            w /= w.norm().clamp_min(1e-12)
    return w.detach()[0].cpu()


def _next_token_loss(logits: Float[Tensor, "B T vocab"], batch: Batch) -> Float[Tensor, ""]:
    assert batch.x is not None
    kept = positions(batch, True)[:, 2:]
    logp = torch.log_softmax(logits[:, 1:-1].float(), -1).gather(-1, batch.x[:, 2:, None])[..., 0]
    return -(logp * kept).sum() / kept.sum()
