"""Adversarial Parameter Decomposition: SPD whose masks are drawn at random and, beside it, chosen by an adversary that remembers.

Bushnaq et al. 2026, Interpreting Language Model Parameters; its code's `nano_param_decomp`. Masks g + (1 - g) r come from random r with
subset routing and from sources r that climb the error of the model with every map masked, step after step; the simplicity term counts
frequent components more; one transformer gives all importances.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor

from decomp_bench.decomposer import Batch, Codes, Point

from ._adversary import Ascent, Scope, Sources, adversarial, at_rows
from ._gates import Gate
from ._reconstruction import Rows, divergence
from .spd import SPD, SPDConfig

SIMPLE_STORIES = {
    "*.attn.q": 288, "*.attn.k": 288, "*.attn.v": 384, "*.attn.o": 480, "*.mlp.up": 1152, "*.mlp.down": 960,
}  # fmt: skip
PILE = {"*.attn.q": 512, "*.attn.k": 512, "*.attn.v": 1024, "*.attn.o": 1024, "*.mlp.up": 3072, "*.mlp.down": 3584}
PUBLISHED: dict[str, Any] = {
    "steps": 400_000, "batch": 64, "init": "random", "gate": "global_shared_transformer", "gate_bias": 0.0, "clip": 0.01, "gate_clip": None,
    "penalty": "lp", "p": 2.0, "p_end": 0.4, "beta": 0.5, "faithfulness": 1e7, "warmup": 0, "warmup_faith": 400, "warmup_faith_lr": 1e-3,
    "adversary_lr": 0.01, "adversary_steps": 2, "adversary_warmup": 0.025,
}  # fmt: skip


class VPDConfig(SPDConfig):
    """SPD's settings with an adversary; `gate`, `beta` and the weights of the two reconstructions have the defaults of VPD."""

    gate: Gate = "global_shared_transformer"
    beta: NonNegativeFloat = 0.5
    subset: NonNegativeFloat = 0.5
    adversarial: NonNegativeFloat = 0.5
    """Weight of reconstruction under the adversary's masks, every map masked."""
    adversary: Literal["persistent", "fresh"] = "persistent"
    """persistent: sources are kept and climb by Adam, also after the step. fresh: drawn in every step, climbing by the gradient's sign."""
    adversary_scope: Scope = "position"
    """What has sources of its own: each position of the batch, each row, each place in a row, or nothing (shared)."""
    adversary_steps: NonNegativeInt = 2
    """Ascents before the step's own pass."""
    adversary_lr: PositiveFloat = 0.01
    adversary_warmup: Annotated[float, Field(ge=0, le=1)] = 0.025
    """Share of the run in which the adversary's rate rises."""
    adversary_betas: tuple[float, float] = (0.5, 0.99)
    adversary_dtype: Literal["float32", "bfloat16"] = "float32"
    """What persistent sources and their moments are held in: for the published Pile run they take 15 GB in float32."""

    @model_validator(mode="after")
    def _one_batch(self) -> VPDConfig:
        if self.accumulate > 1 and self.adversary == "persistent":
            raise ValueError("accumulate: persistent sources climb the gradient of a whole batch; set accumulate=1, or adversary=fresh")
        return self


class VPD(SPD):
    """See the module."""

    name = "vpd"
    summary = "rank-one components of weight matrices under random and adversarial masks"
    Config = VPDConfig
    paper = "Bushnaq, Braun, Clive-Griffin, Bussmann, Hu, Ivanitskiy, Linsefors, Sharkey 2026, Interpreting Language Model Parameters"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"gate": "shared", "steps": 20, "batch": 2, "warmup_faith": 50, "gamma_end": None, "adversary_steps": 1},
        "laptop": {"gate": "shared", "steps": 400, "batch": 2, "warmup_faith": 100, "adversary_steps": 1, "adversary_lr": 0.05},
        "paper": {
            **PUBLISHED, "components": PILE, "lr": 5e-5, "gate_lr": 5e-5, "importance": 2e-4, "adversary_dtype": "bfloat16",
            "gate_width": 2048, "gate_blocks": 8, "gate_heads": 16, "gate_hidden": (8192,),
        },
        "ss-2l": {
            **PUBLISHED, "components": SIMPLE_STORIES, "lr": 3e-4, "gate_lr": 3e-4, "importance": 1e-3,
            "gate_width": 512, "gate_blocks": 4, "gate_heads": 8, "gate_hidden": (2048,),
        },
    }  # fmt: skip

    config: VPDConfig

    def build(self, generator: torch.Generator) -> None:
        super().build(generator)
        config, target = self.config, self.target
        persists = config.adversary == "persistent"
        places = 1 if not target.is_lm else target.context
        self.sources = Sources(
            {site.name: site.n for site in self.sites}, config.adversary_scope, config.batch, places,
            Ascent(*config.adversary_betas, sign=not persists), getattr(torch, config.adversary_dtype),
        )  # fmt: skip
        self._leaves: dict[Point, Tensor] = {}
        self._rate = 0.0

    # ---- the adversary

    def _reconstructions(self, batch: Batch, rows: Rows, lower: dict[Point, Tensor], progress: float) -> dict[str, Tensor]:
        terms = super()._reconstructions(batch, rows, lower, progress)
        weight = self.config.adversarial
        if weight:
            error = self._adversarial(batch, rows, lower, progress)
            self._statistics["adversarial_kl" if self.target.is_lm else "adversarial_mse"] = error.detach()
            terms["adversarial"] = weight * error
        return terms

    def _adversarial(self, batch: Batch, rows: Rows, lower: dict[Point, Tensor], progress: float) -> Tensor:
        """The error under the adversary's masks, after its ascents on this batch."""
        assert batch.x is not None
        config, persists = self.config, self.config.adversary == "persistent"
        self._rate = self.adversary_rate(progress)
        generator, device = self.uniforms.generator(self.target.device), self.target.device
        if not self.sources.value or not persists:
            self.sources.start(generator, device)
        self.sources.reach(batch.x.shape[1] if self.target.is_lm else 1, generator, device)
        fixed = {name: g.detach() for name, g in lower.items()}
        with self._frozen():
            for _ in range(config.adversary_steps):
                leaves = self.sources.leaves()
                error = divergence(self, batch, rows, self._attack(batch, rows, fixed, leaves), self.layers)
                gradients = torch.autograd.grad(error, list(leaves.values()))
                self.sources.ascend(dict(zip(leaves, gradients, strict=True)), self._rate)
        self._leaves = self.sources.leaves() if persists else self.sources.value
        return divergence(self, batch, rows, self._attack(batch, rows, lower, self._leaves), self.layers)

    def adversary_rate(self, progress: float) -> float:
        """Rate of an ascent: a linear rise, then constant; fresh sources need no rise."""
        rise = self.config.adversary_warmup if self.config.adversary == "persistent" else 0.0
        return self.config.adversary_lr * (min(1.0, progress / rise) if rise else 1.0)

    def _attack(self, batch: Batch, rows: Rows, lower: dict[Point, Tensor], sources: dict[Point, Tensor]) -> Codes:
        assert batch.x is not None
        lm = self.target.is_lm
        shape, first = (len(batch.x), batch.x.shape[1] if lm else 1), int(self.target.keeps_first)
        return {
            name: adversarial(g, at_rows(sources[name].to(g.dtype), rows, shape, first), rows, self.config.delta)
            for name, g in lower.items()
        }

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Components without gradients: the ascents need those of the sources alone."""
        parameters = list(self.parts.parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def after_step(self, progress: float) -> None:
        """Let persistent sources climb the gradient of the step's own pass."""
        super().after_step(progress)
        weight = self.config.adversarial
        gradients = {name: leaf.grad / weight for name, leaf in self._leaves.items() if leaf.grad is not None}
        self._leaves = {}
        if gradients:
            self.sources.ascend(gradients, self._rate)

    def train_state(self) -> dict[str, Tensor]:
        kept = {f"adversary.{key}": value for key, value in self.sources.state().items()} if self._persisting else {}
        return {**super().train_state(), **kept}

    @property
    def _persisting(self) -> bool:
        return self.config.adversary == "persistent" and bool(self.sources.value)

    def load_train_state(self, state: dict[str, Tensor]) -> None:
        super().load_train_state(state)
        kept = {key.removeprefix("adversary."): value for key, value in state.items() if key.startswith("adversary.")}
        if kept:
            self.sources.load(kept, self.target.device)

    @property
    def family(self) -> str:
        return super().family.replace("spd", "vpd", 1)
