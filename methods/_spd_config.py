"""Training settings of SPD, and with them of whatever extends it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from decomp_bench.config import MethodConfig

from ._adversary import Scope
from ._gates import GLOBAL, Gate

ADVERSARY = (
    "adversarial", "adversary", "adversary_scope", "adversary_steps", "adversary_lr", "adversary_warmup", "adversary_betas",
    "adversary_dtype",
)  # fmt: skip
ADDED = (
    "tied", "ci_masked", "ci_layerwise", "ci_subset", "unmasked", "hidden", "schatten", "adversary_routing", "adversary_init", "collapse",
    "self_gated", "self_masked", "self_importance",
)  # fmt: skip


class SPDConfig(MethodConfig):
    """Training settings; importances and penalties are per position, losses are means over real positions."""

    younger = (*ADDED, *ADVERSARY)
    components: PositiveInt | dict[str, PositiveInt] | None = None
    """Components of each matrix; None: 1.125 for each neuron of the MLP (of the residual stream for attention maps). A mapping, such as
    {"*.mlp.up": 512, "0.attn.q": 64}, gives the number for each pattern of points, and only matrices that one matches are decomposed."""
    attention: bool = False
    """Decompose q, k, v and o too, where `components` is not a mapping."""
    init: Literal["random", "neuron", "aligned"] = "neuron"
    """neuron: component c starts as neuron c of the MLP, so that W is matched exactly; attention maps always start at random.
    aligned: random directions, each as strong as it is in W (SPD paper)."""
    tied: bool = False
    """Where one matrix is another's transpose, their components are one too: each step moves them twice, once for each use (SPD paper)."""
    gate: Annotated[Gate, BeforeValidator(lambda name: "scalar" if name == "mlp" else name)] = "shared"
    """shared: one MLP of what an MLP (attention) reads for all its components; scalar (`mlp`): a tiny MLP of each inner activation;
    vector_mlp and shared_mlp: of a map's input, a tiny MLP for each component, or one for all of them; global_shared_mlp and
    global_shared_transformer: one network of the inputs of all maps, so that gates need the clean pass."""
    gate_hidden: tuple[PositiveInt, ...] | None = None
    """Hidden widths of the gate networks; None: the width of the MLP for shared ones, 16 for scalar, 8 for vector_mlp, and 4 gate_width in
    a transformer's blocks."""
    gate_width: PositiveInt = 128
    """Width of a transformer's stream."""
    gate_blocks: PositiveInt = 2
    gate_heads: PositiveInt = 4
    gate_rope: PositiveFloat = 10_000.0
    """Base of a transformer's rotary positions."""
    gate_init: Literal["random", "neuron"] = "neuron"
    """neuron: a shared gate's first hidden units start as the MLP's neurons, each opening its own components; for `init` neuron only."""
    gate_bias: float = 0.2
    """Initial bias of the logits: components start let through."""
    gate_lr: PositiveFloat = 8e-3
    gate_clip: PositiveFloat | None = 1.0
    sigmoid: Literal["straight_through", "leaky"] = "straight_through"
    """Lower importance: the main form, or the paper's, whose masks go slightly negative in training."""
    threshold: NonNegativeFloat = 0.0
    """Importances above it are active in an evaluation that asks for no sparsity of its own."""
    importance: NonNegativeFloat = 2e-3
    """Weight of importance minimality: the point on the curve."""
    penalty: Literal["smooth_l0", "lp"] = "smooth_l0"
    gamma: PositiveFloat = 1.0
    gamma_end: PositiveFloat | None = 0.1
    """Width of smooth L0, annealed geometrically."""
    p: PositiveFloat = 2.0
    p_end: PositiveFloat | None = None
    """Exponent of L_p, annealed linearly."""
    p_eps: NonNegativeFloat = 1e-12
    anneal_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    anneal_to: Annotated[float, Field(gt=0, le=1)] = 1.0
    beta: NonNegativeFloat = 0.0
    """Weight of the frequency term inside importance minimality."""
    faithfulness: NonNegativeFloat = 1e4
    stochastic: NonNegativeFloat = 0.0
    """Weight of reconstruction with every map masked at once."""
    layerwise: NonNegativeFloat = 0.0
    """Weight of reconstruction with one map masked at a time."""
    subset: NonNegativeFloat = 1.0
    """Weight of reconstruction with a random subset of maps masked, drawn for each position."""
    ci_masked: NonNegativeFloat = 0.0
    """Weight of reconstruction where the masks are the importances themselves, without the remainder."""
    ci_layerwise: NonNegativeFloat = 0.0
    """The same with one map masked at a time."""
    ci_subset: NonNegativeFloat = 0.0
    """The same with a random subset of maps masked, drawn for each position."""
    unmasked: NonNegativeFloat = 0.0
    """Weight of reconstruction with every component fully on, without the remainder."""
    self_gated: NonNegativeFloat = 0.0
    """Weight of reconstruction with every map masked at once, where importances are those of the masked pass itself (gates=self), and
    not of the clean one."""
    self_masked: NonNegativeFloat = 0.0
    """The same where those importances are the masks, without the remainder: what an evaluation with gates=self does."""
    self_importance: NonNegativeFloat = 0.0
    """Weight of importance minimality of those importances, as a multiple of `importance`: what is not paid for there opens too often."""
    hidden: NonNegativeFloat = 0.0
    """Weight of the mean squared error of what the maps read when every map is masked at random."""
    schatten: NonNegativeFloat = 0.0
    """Weight of the Schatten penalty: L_p of the importances, each times |V_c|^2 + |U_c|^2."""
    samples: PositiveInt = 1
    """Mask draws behind each reconstruction term."""
    delta: bool = True
    """Let the remainder W - VU through by a random amount in masked passes."""
    adversarial: NonNegativeFloat = 0.0
    """Weight of reconstruction under an adversary's masks."""
    adversary: Literal["persistent", "fresh"] = "fresh"
    """fresh: sources are drawn in every step and climb by the gradient's sign (PGD).
    persistent: they are kept and climb by Adam, also after the step (VPD)."""
    adversary_scope: Scope = "shared"
    """What has sources of its own: each position of the batch, each row, each place in a row, or nothing (shared)."""
    adversary_routing: Literal["all", "subset", "layerwise"] = "all"
    """Which maps the adversary masks at once: all, a random subset drawn for each position, or one at a time, each with its own ascents."""
    adversary_init: Literal["random", "ones", "zeros"] = "random"
    """Where sources start."""
    adversary_steps: NonNegativeInt = 1
    """Ascents before the step's own pass."""
    adversary_lr: PositiveFloat = 1.0
    """Size of an ascent."""
    adversary_warmup: Annotated[float, Field(ge=0, le=1)] = 0.025
    """Share of the run in which the rate of persistent sources rises."""
    adversary_betas: tuple[float, float] = (0.5, 0.99)
    adversary_dtype: Literal["float32", "bfloat16"] = "float32"
    """What persistent sources and their moments are held in: for the published Pile run of VPD they take 15 GB in float32."""
    collapse: bool = False
    """Compute a toy's rows without input once, weighted by their number: exact where all maps read zero there, and up to four times as
    fast on sparse features. Language models are left as they are."""
    warmup_faith: NonNegativeInt = 200
    """Steps of faithfulness alone before training; skipped where the initial components already sum to W."""
    warmup_faith_lr: PositiveFloat = 1e-2
    warmup_faith_decay: NonNegativeFloat = 0.0
    steps: NonNegativeInt = 600
    batch: PositiveInt = 2
    lr: PositiveFloat = 4e-3
    schedule: Literal["constant", "linear", "cosine", "quarter_cosine"] = "cosine"
    decay_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    lr_end: Annotated[float, Field(ge=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _sources_fit(self) -> SPDConfig:
        if self.adversary == "persistent" and self.accumulate > 1:
            raise ValueError("accumulate: persistent sources climb the gradient of a whole batch; set accumulate=1, or adversary=fresh")
        if self.adversary == "persistent" and self.adversary_routing == "layerwise":
            raise ValueError("adversary_routing: one map at a time has no sources to keep; set adversary=fresh, or all or subset")
        if (self.self_gated or self.self_masked) and self.gate in GLOBAL:
            name = "self_gated" if self.self_gated else "self_masked"
            raise ValueError(f"{name}: gates of gate={self.gate} need the clean pass; set {name}=0, or gate=shared")
        if self.self_importance and not (self.self_gated or self.self_masked):
            raise ValueError("self_importance: no term has gates of its own; set self_gated or self_masked, or self_importance=0")
        if self.adversary == "persistent" and self.adversarial and self.collapse:
            raise ValueError("collapse: persistent sources belong to the rows of a whole batch; set collapse=false, or adversary=fresh")
        return self
