"""Stochastic Parameter Decomposition: weight matrices as sums of rank-one components, few of which matter at any one position.

Bushnaq, Braun and Sharkey 2025 (arXiv 2506.20790), in the later form of its authors' code ("main"): straight-through importances, the
weight delta as a masked remainder, faithfulness warm-up, uniform-k-subset routing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.decomposer import Batch, Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot, layer_of
from decomp_bench.errors import UserError
from decomp_bench.replacement import clean_reads

from ._adversary import Adversary
from ._components import (
    Components,
    aligned_components,
    faithfulness,
    masked_map,
    neuron_components,
    random_components,
    strengths,
    tie,
    warm_up,
)
from ._gates import EVERYWHERE, GLOBAL, gate_logits, global_gates, key_of, unit_gates
from ._importance import Penalty, annealed, importances, schatten
from ._masks import Uniforms
from ._reconstruction import Rows, collapsed, rows_of
from ._spd_config import SPDConfig
from ._spd_losses import STOCHASTIC, OwnMasks, reconstructions
from ._spd_stack import StackedSPD, fits, together

if TYPE_CHECKING:
    from decomp_bench.targets import TargetModel

SPARE = 1.125
"""Components for each neuron where the config gives no number: every neuron could be one, and some are left over."""


class SPD(Decomposer):
    """See the module."""

    name = "spd"
    summary = "rank-one components of weight matrices under stochastic masks"
    Config = SPDConfig
    kind = "replacement"
    trains_on = "sequences"
    swept = ("k", "threshold", "mask", "delta")
    paper = "Bushnaq, Braun, Sharkey 2025, Stochastic Parameter Decomposition, arXiv:2506.20790"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 20, "batch": 2, "warmup_faith": 50, "gamma_end": None},  # annealing raises the penalty of the same importances
        "laptop": {"steps": 400, "batch": 2, "warmup_faith": 100},
        "paper": {  # the authors' two-layer language model ("main" form), without its adversarial term
            "steps": 200_000, "batch": 64, "lr": 5e-4, "gate_lr": 5e-4, "clip": 0.01, "gate_clip": None, "init": "random", "gate_bias": 0.0,
            "gate_hidden": (550,), "penalty": "lp", "p_end": 0.3, "beta": 0.1, "importance": 1e-3, "faithfulness": 1e6,
            "warmup_faith": 200, "warmup_faith_lr": 1e-3,
        },
        "paper_form": {  # the paper's method and its settings for TMS 5-2
            "steps": 40_000, "batch": 4096, "lr": 1e-3, "gate_lr": 1e-3, "schedule": "quarter_cosine", "lr_end": 0.0, "warmup": 0,
            "clip": None, "gate_clip": None, "init": "aligned", "tied": True, "components": 20, "gate": "scalar", "gate_hidden": (16,),
            "gate_bias": 0.0, "sigmoid": "leaky", "delta": False, "penalty": "lp", "p": 1.0, "importance": 3e-3, "faithfulness": 1.0,
            "stochastic": 1.0, "layerwise": 1.0, "subset": 0.0, "warmup_faith": 0,
        },
    }  # fmt: skip

    config: SPDConfig

    # ---- structure

    def build(self, generator: torch.Generator) -> None:
        config, target = self.config, self.target
        self.parts, self.gates = nn.ModuleDict(), nn.ModuleDict()
        self._own: dict[Point, tuple[Tensor, Tensor | None]] = {}  # taken now: while a pass runs, the maps stand replaced
        kinds = ("mlp", "attn") if config.attention or isinstance(config.components, dict) else ("mlp",)
        units = [f"{layer}.{unit}" for layer in self.layers for unit in kinds]
        points = {unit: [p for p in target.maps(layer_of(unit), unit.split(".")[1]) if self._decomposes(p)] for unit in units}
        self._check(points)
        everywhere = tuple(point for unit in units for point in points[unit])
        for unit in units:
            made: list[Site] = []
            for point in points[unit]:
                part = self._initial(point, generator)
                self._own[point] = (target.weight(point), target.bias(point))
                self.parts[key_of(point)] = part
                sources = everywhere if config.gate in GLOBAL else (f"{unit}.in" if config.gate == "shared" else point,)
                made.append(Site(point, layer_of(point), sources, (Slot(point, point),), part.n))
            if made and config.gate not in GLOBAL:
                self.gates.update(unit_gates(config, target, unit, made, generator))
            self.sites += made
        if config.gate in GLOBAL:
            self.gates[EVERYWHERE] = global_gates(config, target, self.sites, generator)
        self.uniforms = Uniforms(int(torch.randint(2**62, (1,), generator=generator)))
        self._tie()
        self.adversary = Adversary(self)
        self._statistics: dict[str, Tensor] = {}
        self._own_masks: OwnMasks | None = None

    def _tie(self) -> None:
        if self.config.tied:
            tie(self.components, self.weights)

    def _decomposes(self, point: Point) -> bool:
        return not isinstance(self.config.components, dict) or bool(_matches(point, self.config.components))

    def _check(self, points: dict[str, list[Point]]) -> None:
        """A mapping of components must name some matrix with each pattern, no matrix twice, and a matrix of every layer's MLP."""
        counts = self.config.components
        if not isinstance(counts, dict):
            return
        maps = [point for layer in self.layers for unit in ("mlp", "attn") for point in self.target.maps(layer, unit)]
        idle = [pattern for pattern in counts if not any(fnmatchcase(point, pattern) for point in maps)]
        twice = [point for point in maps if len(_matches(point, counts)) > 1]
        without = [str(layer) for layer in self.layers if not points[f"{layer}.mlp"]]
        if idle:
            raise UserError(f"components: '{idle[0]}' matches no matrix of the chosen layers; they have {', '.join(maps)}")
        if twice:
            raise UserError(f"components: {twice[0]} matches {' and '.join(_matches(twice[0], counts))}; one pattern may match it")
        if without:
            raise UserError(f"components name no MLP matrix of layer {', '.join(without)}; leave out the layer, whose MLP would stay whole")

    def _initial(self, point: Point, generator: torch.Generator) -> Components:
        target, config = self.target, self.config
        weight = target.weight(point)
        is_mlp, writes = point.split(".")[1] == "mlp", point.endswith(".down")
        base = weight.shape[1 if writes else 0] if is_mlp else target.width
        counts = config.components
        n = counts[_matches(point, counts)[0]] if isinstance(counts, dict) else counts or round(SPARE * base)
        if config.init == "neuron" and is_mlp:
            return neuron_components(weight, n, writes, generator)
        if config.init == "aligned":
            return aligned_components(weight, n, generator)
        return random_components(weight, n, generator)

    @property
    def components(self) -> dict[Point, Components]:
        """The components of each site."""
        return {site.name: self.parts[key_of(site.name)] for site in self.sites}  # type: ignore[misc]

    @property
    def weights(self) -> dict[Point, Tensor]:
        """The target's matrix of each site."""
        return {name: weight for name, (weight, _) in self._own.items()}

    # ---- codes

    def logits(self, inputs: Inputs, strength: dict[Point, Tensor]) -> dict[Point, Float[Tensor, "*rows C"]]:
        """Pre-sigmoid importances of the sites whose strengths are given, from the activations that gate them."""
        sites = [site for site in self.sites if site.name in strength]
        return gate_logits(self.config.gate, self.gates, sites, inputs, strength)

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        sites = [site for site in self.sites if site.name in inputs]
        parts = self.components
        if gates is not None:
            return {s.name: replace(gates[s.name], strength=strengths(inputs[s.name], parts[s.name].V, gates[s.name])) for s in sites}
        sites = [site for site in sites if all(point in inputs for point in site.gates_from)]
        strength = {site.name: strengths(inputs[site.name], parts[site.name].V) for site in sites}
        logits = self.logits(inputs, strength)
        if self._own_masks is not None:
            return {name: self._own_masks(value, logits[name]) for name, value in strength.items()}
        return {name: SiteCodes(value, self._gate(logits[name]), self._delta(value)) for name, value in strength.items()}

    @contextmanager
    def masking_itself(self, masks: OwnMasks) -> Iterator[None]:
        """While it lasts, gates that a pass computes itself are masks of training."""
        self._own_masks = masks
        try:
            yield
        finally:
            self._own_masks = None

    def _gate(self, logits: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        """The mask of an evaluation: importances above a threshold (0 by default) or the k largest, as one or as they are."""
        choice = self.choice
        if choice.mask == "all":
            return torch.ones_like(logits)
        if choice.k is not None:  # by the logit: importances saturate at 1 and tie there
            kept = torch.zeros_like(logits).scatter(-1, logits.topk(min(choice.k, logits.shape[-1]), -1).indices, 1.0)
        else:
            threshold = self.config.threshold if choice.threshold is None else choice.threshold
            kept = (logits > (threshold if threshold < 1 else math.inf)).to(logits.dtype)
        return kept * logits.clamp(0, 1) if choice.mask == "soft" else kept

    def _delta(self, strength: Tensor) -> Tensor | None:
        return torch.ones_like(strength[..., 0]) if self.choice.delta else None

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        return masked_map(inputs[write], codes[write], self.components[write].U, *self._own[write])

    # ---- training

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        config = self.config
        batch, rows = collapsed(batch, self.target, self.points()) if config.collapse else (batch, rows_of(batch, self.target))
        penalty, straight = self._penalty(progress), config.sigmoid == "straight_through"
        lower, minimality, frequency = {}, [], {}
        logits = self._clean_logits(batch, rows)
        for name, z in logits.items():
            lower[name], cost, frequency[name] = importances(z, rows.weight, rows.count, penalty, straight)
            minimality.append(cost)
        faith = faithfulness(self.components, self.weights)
        terms = {"faithfulness": config.faithfulness * faith, "importance": config.importance * torch.stack(minimality).sum()}
        if config.schatten:
            terms["schatten"] = config.schatten * self._schatten(logits, rows, progress)
        terms |= self._reconstructions(batch, rows, lower, penalty, progress)
        silent = torch.cat([(value == 0).float() for value in frequency.values()]).mean()
        self._statistics |= {"l0": _l0(frequency) / len(self.layers), "dead": silent, "faith": faith.detach()}
        return terms

    def _reconstructions(
        self, batch: Batch, rows: Rows, lower: dict[Point, Tensor], penalty: Penalty, progress: float
    ) -> dict[str, Tensor]:
        """The weighted terms that compare masked passes with the target."""
        config, unit = self.config, "kl" if self.target.is_lm else "mse"
        errors = reconstructions(self, batch, rows, lower, penalty)
        for error in [errors[name] for name in STOCHASTIC if name in errors]:
            self._statistics[unit] = error.detach()
        if config.adversarial:
            errors["adversarial"] = self.adversary.error(self, batch, rows, lower, progress)
            self._statistics[f"adversarial_{unit}"] = errors["adversarial"].detach()
        return {name: getattr(config, name) * error for name, error in errors.items()}

    def _schatten(self, logits: dict[Point, Tensor], rows: Rows, progress: float) -> Tensor:
        config, parts = self.config, self.components
        p = annealed(config.p, config.p_end, progress, config.anneal_from, config.anneal_to)
        found = [schatten(z, rows.weight, parts[name].V, parts[name].U, p, config.p_eps) for name, z in logits.items()]
        return torch.stack(found).sum()

    def _clean(self, batch: Batch, rows: Rows, point: Point) -> Float[Tensor, "rows d"]:
        value = batch.clean[point]
        return rows.of(value[:, 1:] if self.target.keeps_first else value)

    def _clean_logits(self, batch: Batch, rows: Rows) -> dict[Point, Tensor]:
        if self.config.gate == "global_shared_transformer":  # attends: rows stay whole until after it
            found = self.logits(clean_reads(self, batch), dict.fromkeys(self.components, torch.empty(0)))
            return {name: rows.of(value) for name, value in found.items()}
        sources = {point for site in self.sites for point in site.gates_from}
        inputs = {point: self._clean(batch, rows, point) for point in sources}
        if self.config.gate == "scalar":
            return self.logits(inputs, {name: inputs[name] @ part.V for name, part in self.components.items()})
        return self.logits(inputs, dict.fromkeys(self.components, torch.empty(0)))

    def _penalty(self, progress: float) -> Penalty:
        config = self.config
        smooth = config.penalty == "smooth_l0"
        start, end = (config.gamma, config.gamma_end) if smooth else (config.p, config.p_end)
        value = annealed(start, end, progress, config.anneal_from, config.anneal_to, geometric=smooth)
        return Penalty(config.penalty, value, config.beta, config.p_eps)

    # ---- training hooks

    def before_training(self, data: Iterator[Batch]) -> None:
        if self.config.gate == "shared":
            batch = next(data)
            rows = rows_of(batch, self.target)
            with torch.no_grad():
                for unit, gates in self.gates.items():
                    point = unit.replace("_", ".") + ".in"
                    square = rows.weight @ self._clean(batch, rows, point).square().mean(-1)
                    gates.scale.copy_(square.clamp_min(1e-12).rsqrt())  # type: ignore[union-attr]
        with torch.enable_grad():
            config = self.config
            if config.warmup_faith and float(faithfulness(self.components, self.weights).detach()) > 0:
                warm_up(self.components, self.weights, config.warmup_faith, config.warmup_faith_lr, config.warmup_faith_decay)

    def parameter_groups(self) -> list[dict[str, Any]]:
        config = self.config
        self._tie()  # moving to a device parted what lay in one memory
        return [
            {"params": list(self.parts.parameters()), "lr": config.lr, "clip": config.clip},
            {"params": list(self.gates.parameters()), "lr": config.gate_lr, "clip": config.gate_clip},
        ]

    def after_step(self, progress: float) -> None:
        self.adversary.after_step(self.config.adversarial)

    def train_state(self) -> dict[str, Tensor]:
        return {"generator": self.uniforms.state(self.target.device), **self.adversary.state()}

    def load_train_state(self, state: dict[str, Tensor]) -> None:
        self.uniforms.load(state["generator"], self.target.device)
        self.adversary.load(state, self.target.device)

    def step_statistics(self) -> dict[str, Tensor]:
        return self._statistics

    def stackable(self) -> int:
        return 0 if self.target.is_lm or not fits(self.config) else together(self)

    @classmethod
    def stacked(cls, members: Sequence[SPD]) -> StackedSPD:  # type: ignore[override]
        return StackedSPD(members)

    # ---- accounting

    def component_sizes(self, site: Site) -> int:
        return sum(self.target.weight(site.name).shape)

    def constant_size(self, write: Point) -> int:
        bias = self.target.bias(write)
        return (0 if bias is None else bias.numel()) + (self.target.weight(write).numel() if self.choice.delta else 0)

    def constant_coefficients(self, write: Point) -> int:
        return min(self.target.weight(write).shape) if self.choice.delta else 0

    def directions(self, site: Site, slot: Slot) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        part = self.components[site.name]
        return part.V.T, part.U

    @property
    def variant(self) -> str:
        return f"imp={self.config.importance:g}"

    @property
    def family(self) -> str:
        return f"spd {self.config.init} init" + (", attention" if self.config.attention else "")

    @property
    def init(self) -> str:
        return self.config.init

    def sweep(self) -> list[Choice]:
        return [Choice(threshold=value) for value in (0.01, 0.1, 0.3, 0.5, 0.9)]

    @classmethod
    def skip(cls, target: TargetModel, layers: tuple[int, ...]) -> str | None:
        without = [str(layer) for layer in layers if not target.maps(layer)]
        return f"no known linear maps in the MLP of layers {', '.join(without)}" if without else None


def _l0(frequency: dict[Point, Tensor]) -> Tensor:
    """Mean number of active components of all MLP matrices together."""
    return torch.stack([value.sum() for name, value in frequency.items() if ".mlp." in name]).sum()


def _matches(point: Point, counts: dict[str, int]) -> list[str]:
    """The patterns that match a point."""
    return [pattern for pattern in counts if fnmatchcase(point, pattern)]
