"""Induction heads: an attention-only model of two layers that recalls which token followed an earlier one (SPD, induction task).

A row is `[bos] T* S M T* S M`: random tokens, one of them preceded by the marker S, and S again at the last but one place; what follows
is M. One head of full width a layer, no norms, no biases, sinusoidal positions added to what queries and keys read, an unembedding of
its own. A block's MLP is empty: it writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.toys.truth import Toy, Truth

BOS = 0
SMALL_WEIGHT = 0.1
"""Weight of the loss at places other than the answer, where tokens are random: it makes their predictions the uniform ones."""


def positions(length: int, width: int) -> Float[Tensor, "length width"]:
    """Sinusoidal positions."""
    angle = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class _Attention(nn.Module):
    place: Tensor

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.register_buffer("place", positions(length, width), persistent=False)

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        placed = x + self.place[: x.shape[1]]
        q, k, v = self.q(placed), self.k(placed), self.v(x)
        return self.o(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])

    def at(self, x: Float[Tensor, "B T d"], query: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q d"]:
        """The output at some places of each row only."""
        placed = x + self.place[: x.shape[1]]
        asked = placed.gather(1, query[:, :, None].expand(-1, -1, x.shape[2]))
        seen = torch.arange(x.shape[1]) <= query[:, :, None]
        q, k, v = self.q(asked), self.k(placed), self.v(x)
        return self.o(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=seen[:, None])[:, 0])


class _Empty(nn.Module):
    """The MLP of an attention-only block."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Block(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(width, length), _Empty()

    def forward(self, resid: Tensor) -> Tensor:
        resid = resid + self.attn(resid)
        return resid + self.mlp(resid)


class InductionModel(nn.Module):
    """The model; called like a causal language model, it gives an object with `logits`."""

    def __init__(self, vocab: int, width: int, length: int) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.blocks = nn.ModuleList(Block(width, length) for _ in range(2))

    def forward(self, input_ids: Int[Tensor, "B T"], use_cache: bool = False) -> SimpleNamespace:
        resid = self.embed(input_ids)
        for block in self.blocks:
            resid = block(resid)
        return SimpleNamespace(logits=self.unembed(resid))

    def at(self, input_ids: Int[Tensor, "B T"], query: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q vocab"]:
        """Logits at some places of each row only."""
        first, second = self.blocks
        resid: Tensor = first(self.embed(input_ids))
        here = resid.gather(1, query[:, :, None].expand(-1, -1, resid.shape[2]))
        return self.unembed(here + second.attn.at(resid, query))  # type: ignore[operator, union-attr]


@dataclass(frozen=True)
class Induction:
    """Cross-entropy of the answer; accepted where the answer is the model's first choice in the share `gate` of fresh rows."""

    tokens: int = 128
    length: int = 64
    width: int = 16
    prefix: int = 61
    """The first marker stands at one of the places 1 to `prefix` - 1."""
    steps: int = 1600
    batch: int = 256
    lr: float = 1e-2
    warmup: int = 200
    weight_decay: float = 0.01
    gate: float = 0.95

    @property
    def vocab(self) -> int:
        """Random tokens, beginning of row, marker."""
        return self.tokens + 2

    def draw(self, rows: int, generator: torch.Generator) -> Int[Tensor, "rows length1"]:
        """Rows with their answer: [rows, length + 1]."""
        x = torch.randint(1, self.tokens + 1, (rows, self.length + 1), generator=generator)
        marker = torch.randint(1, self.prefix, (rows, 1), generator=generator)
        x[:, 0], x[:, self.length - 1] = BOS, self.tokens + 1
        x.scatter_(1, marker, self.tokens + 1)
        x[:, self.length] = x.gather(1, marker + 1)[:, 0]
        return x

    def train(self, seed: int, progress: Callable[[int, int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and the gate's figures."""
        generator = torch.Generator().manual_seed(seed)
        model = self._initial(generator)
        optimiser = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)
        with torch.enable_grad():
            for step in range(self.steps):
                rate = min(1.0, (step + 1) / self.warmup, 2 * (1 - step / self.steps))
                optimiser.param_groups[0]["lr"] = self.lr * rate
                optimiser.zero_grad()
                self._loss(model, self.draw(self.batch, generator), generator).backward()
                optimiser.step()
                if step % 100 == 99:
                    progress(step + 1, self.steps)
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return weights, self._figures(model, generator)

    def _initial(self, generator: torch.Generator) -> InductionModel:
        model = InductionModel(self.vocab, self.width, self.length + 1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                scale = 1.0 if name == "embed.weight" else self.width**-0.5
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
        return model

    def _loss(self, model: InductionModel, x: Tensor, generator: torch.Generator) -> Tensor:
        """The answer, and the token after one random place of each row."""
        anywhere = torch.randint(1, self.length - 1, (len(x), 1), generator=generator)
        query = torch.cat([torch.full_like(anywhere, self.length - 1), anywhere], 1)
        logits, following = model.at(x[:, :-1], query), x.gather(1, query + 1)
        answer, other = (F.cross_entropy(logits[:, i], following[:, i]) for i in range(2))
        return answer + SMALL_WEIGHT * other

    @torch.no_grad()
    def _figures(self, model: InductionModel, generator: torch.Generator) -> dict[str, Any]:
        x = self.draw(4096, generator)
        logits = model.at(x[:, :-1], torch.full((len(x), 1), self.length - 1))[:, 0]
        right = float((logits.argmax(1) == x[:, -1]).float().mean())
        return {"right": right, "answer_ce": float(F.cross_entropy(logits, x[:, -1])), "accepted": right > self.gate}

    def build(self, weights: dict[str, Tensor], uri: str, device: str | torch.device) -> TargetModel:
        """The target with these weights; what is known of it is the task, not its mechanisms."""
        model = InductionModel(self.vocab, self.width, self.length + 1)
        model.load_state_dict(weights)
        maps = {f"attn.{name}": f"blocks.{{}}.attn.{name}" for name in "qkvo"}
        architecture = Architecture(block="blocks.{}", mlp="blocks.{}.mlp", attn="blocks.{}.attn", maps=maps)
        target = TargetModel(uri, model, architecture, 2, self.width, "lm", context=self.length + 1, device=device)
        key = f"induction rows of {self.length + 1}, {self.tokens} tokens, first marker before {self.prefix}"
        target.toy = Toy(self.draw, key, Truth(torch.zeros(0, self.width), math.nan))
        return target

    @staticmethod
    def verdict(figures: dict[str, Any]) -> str:
        """What a rejected training came to."""
        return f"gives the right answer in {figures['right']:.0%} of rows"
