"""A sparse coder's parts: fixed normalisation of what is read and written, and one site's encoder and decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._activations import Activation, Code, ReLU
from ._dictionary_config import DictionaryConfig
from ._gated import Gated
from ._jumprelu import JumpReLU
from ._sparse import Support, encode_at, stacked
from ._topk import BatchTopK, GroupMax, Matryoshka, TopK

ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "matryoshka": Matryoshka,
    "groupmax": GroupMax,
}

ENCODER_SCALE = 0.25
"""Length of an untied encoder row at the start: random codes say nothing about y, so they start small."""


PART = 1 << 22
"""Pre-activations that are computed at a time where each row selects for itself: memory that stays in use, where a larger matrix would
be asked for anew, page by page, in every step."""

Chosen = tuple[Tensor | None, Support | None]
"""Pre-activations at a support, and the support; or neither, where all entries are computed."""


def unit_rows(rows: int, width: int, generator: torch.Generator) -> Float[Tensor, "rows width"]:
    """Random directions, uniform on the sphere."""
    return F.normalize(torch.randn(rows, width, generator=generator), dim=1)


class Normaliser(nn.Module):
    """Fixed centring and scaling of one point's activations, so that coordinates have mean zero and, on average, variance one."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """To normalised coordinates."""
        return (x - self.mean).mul_(1 / self.scale)

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "rows d"]) -> None:
        """Take mean and scale from data."""
        x = x.to("cpu", torch.float64)
        self.mean.copy_(x.mean(0))
        variance = (x - x.mean(0)).square().mean()
        self.scale.copy_(torch.where(variance > 0, variance, 1.0).sqrt())


class Output(Normaliser):
    """One place that is written to: its normaliser, and its bias in normalised coordinates (so it starts at the mean of y)."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.b_dec = nn.Parameter(torch.zeros(width))

    def restore(self, total: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """From summed contributions of coders to the activation."""
        return (total + self.b_dec) * self.scale + self.mean


class SparseCoder(nn.Module):
    """One site's encoder, activation and decoder: W_enc [n, d_in], b_enc [n], W_dec [n, widths of all places written to, joined].

    With free decoder rows, pre-activations are multiplied by the rows' lengths and the rows count as divided by them: what `pre`
    and `decoder` give then equals an encoder and decoder with unit rows. `W_skip` [d_out, d_in] leads from what is read to the first
    place that is written to, always on; None: there is none.
    """

    idle: Tensor
    dead: Tensor

    def __init__(
        self, config: DictionaryConfig, width: int, out: int, tied: bool, generator: torch.Generator, skip: int | None = None
    ) -> None:
        super().__init__()
        n = config.features
        self.normalise = Normaliser(width)
        decoder = unit_rows(n, out, generator)
        encoder = decoder.clone() if tied else ENCODER_SCALE * unit_rows(n, width, generator)
        self.W_enc, self.b_enc, self.W_dec = nn.Parameter(encoder), nn.Parameter(torch.zeros(n)), nn.Parameter(decoder)
        self.W_skip = nn.Parameter(torch.zeros(skip, width)) if skip else None
        self.free = config.decoder_rows == "free"
        self.activation = ACTIVATIONS[config.activation](config, n, self.b_enc)
        self.register_buffer("idle", torch.zeros(n, dtype=torch.long), persistent=False)  # tokens since a component last fired
        self.register_buffer("dead", torch.zeros(n, dtype=torch.bool), persistent=False)
        self._dead_ids: Tensor | None = None

    @property
    def rows(self) -> Float[Tensor, "n out"]:
        """The decoder's rows, over all places written to together."""
        return self.W_dec

    @property
    def lengths(self) -> Float[Tensor, " n"]:
        """Lengths of the decoder's rows."""
        return self.rows.norm(dim=1).clamp(min=1e-12)

    def decoder(self) -> Float[Tensor, "n d"]:
        """What a strength is multiplied by."""
        return self.rows / self.lengths[:, None] if self.free else self.rows

    def raw(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows n"]:
        """x W_enc^T + b_enc, as selections need it."""
        return F.linear(x, self.W_enc, self.b_enc).float()

    def pre(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows n"]:
        """Pre-activations of normalised inputs."""
        pre = F.linear(x, self.W_enc, self.b_enc)
        return pre * self.lengths if self.free else pre

    def codes(self, x: Float[Tensor, "rows d"], *counts: int | None) -> list[Code]:
        """Codes of normalised inputs as training computes them, for each number of active components (None: the activation's own)."""
        with torch.no_grad():
            whole = x.device.type != "cpu" or not self.activation.by_rows
            parts = [x] if whole else x.split(max(1, PART // self.activation.features))
            chosen = zip(*(self._chosen(part, counts) for part in parts), strict=True)
            joined = [_joined(list(pairs)) for pairs in chosen]
        return [self.code_at(x, entries, support) for entries, support in joined]

    def _chosen(self, x: Float[Tensor, "rows d"], counts: tuple[int | None, ...]) -> list[Chosen]:
        raw = self.raw(x)
        pre = raw * self.lengths if self.free else raw
        supports = [self.activation.support(pre, k) for k in counts]
        return [(None, None) if support is None else (support.of(raw), support) for support in supports]

    def code_at(self, x: Float[Tensor, "rows d"], entries: Float[Tensor, " active"] | None, support: Support | None) -> Code:
        """Codes at a support, given what `raw` gives there; of all entries without one."""
        if support is None or entries is None:
            pre = self.pre(x)
            return Code(pre, self.activation.value(pre), None)
        entries = encode_at(x, self.W_enc, self.b_enc, entries, support)
        if self.free:
            entries = entries * self.lengths.index_select(0, support.col)
        return Code(entries, self.activation.value(entries, support.col), support)

    @torch.no_grad()
    def watch(self, code: Code, seen: Float[Tensor, "*shape"]) -> Tensor:
        """Count the step for the dead-component counters; returns the mean number of active components.

        Running thresholds are told the values `seen`: the code's own, or those of all layers that share a threshold.
        """
        fired = code.fired()
        self.idle.add_(code.rows).mul_(fired == 0)
        self.activation.observe(seen)
        return fired.sum() / code.rows

    def find_dead(self, after: int) -> None:
        """Note which components have not fired for so many tokens."""
        torch.ge(self.idle, after, out=self.dead)
        self.forget_dead_ids()

    def forget_dead_ids(self) -> None:
        """The dead mask has changed."""
        self._dead_ids = None

    @property
    def dead_ids(self) -> Int[Tensor, " dead"]:
        """Components noted as dead."""
        if self._dead_ids is None:
            self._dead_ids = self.dead.nonzero().squeeze(1)
        return self._dead_ids

    @property
    def dead_everywhere(self) -> int:
        """How many components are noted as dead, in all processes where they are divided over several."""
        return len(self.dead_ids)

    def pre_of(self, x: Float[Tensor, "rows d"], ids: Int[Tensor, " some"]) -> Float[Tensor, "rows some"]:
        """Pre-activations of some components."""
        pre = F.linear(x, self.W_enc[ids], self.b_enc[ids]).float()
        return pre * self.lengths[ids] if self.free else pre

    def revival(self, x: Float[Tensor, "rows d"], residual: Float[Tensor, "rows out"], k: int) -> Tensor:
        """Error of the dead components' prediction of the residual, relative to the residual.

        A row uses its k largest dead pre-activations as they are (Gao et al. 2024): most dead components are negative everywhere,
        where a ReLU would let no gradient through. Scaled down where fewer than k are dead.
        """
        ids = self.dead_ids
        pre = self.pre_of(x, ids)
        if len(ids) > k:
            best, index = pre.topk(k, dim=1, sorted=False)
            pre = torch.zeros_like(pre).scatter(1, index, best)
        error = (pre @ self.decoder()[ids] - residual).square().sum()
        return min(1.0, len(ids) / k) * error / residual.square().sum().clamp(min=1e-20)

    @torch.no_grad()
    def to_unit_rows(self) -> None:
        """Give decoder rows unit length, over all places written to together."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    def write_along(self, ids: Int[Tensor, " some"], y: Float[Tensor, "some out"]) -> list[nn.Parameter]:
        """Give some components these decoder rows; returns the parameters that hold them."""
        self.W_dec[ids] = y
        return [self.W_dec]

    @torch.no_grad()
    def restart(self, ids: Int[Tensor, " dead"], x: Float[Tensor, "dead d"], y: Float[Tensor, "dead out"]) -> list[nn.Parameter]:
        """Start some components again: they read along x and write along y. Returns the parameters in whose rows that was done.

        Encoder rows get a fifth of the mean length of the others', biases zero (Bricken et al. 2023).
        """
        others = ~self.dead if bool((~self.dead).any()) else torch.ones_like(self.dead)
        self.W_enc[ids] = F.normalize(x, dim=1) * (0.2 * self.W_enc[others].norm(dim=1).mean())
        self.b_enc[ids] = 0.0
        changed = [self.W_enc, self.b_enc, *self.activation.restart(ids)]
        if self.W_dec.requires_grad:
            changed += self.write_along(ids, F.normalize(y, dim=1))
        self.idle[ids] = 0
        self.dead[ids] = False
        self.forget_dead_ids()
        return changed


def _joined(parts: list[Chosen]) -> Chosen:
    """What was chosen of a matrix, from what was chosen of its parts."""
    entries, supports = zip(*parts, strict=True)
    return parts[0] if len(parts) == 1 else (torch.cat(entries), stacked(list(supports)))
