"""Adversarial Parameter Decomposition: SPD whose masks are drawn at random and, beside it, chosen by an adversary that remembers.

Bushnaq et al. 2026, Interpreting Language Model Parameters; its code's `nano_param_decomp`. Masks g + (1 - g) r come from random r with
subset routing and from sources r that climb the error of the model with every map masked, step after step; the simplicity term counts
frequent components more; one transformer gives all importances.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from ._adversary import Scope
from ._gates import Gate
from ._spd_config import ADDED, SPDConfig
from .spd import SPD

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

    younger = ADDED
    gate: Gate = "global_shared_transformer"
    beta: NonNegativeFloat = 0.5
    subset: NonNegativeFloat = 0.5
    adversarial: NonNegativeFloat = 0.5
    adversary: Literal["persistent", "fresh"] = "persistent"
    adversary_scope: Scope = "position"
    adversary_steps: NonNegativeInt = 2
    adversary_lr: PositiveFloat = 0.01


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

    @property
    def family(self) -> str:
        return super().family.replace("spd", "vpd", 1)
