"""The interface that every method implements: points, slots, sites, codes and the Decomposer itself.

A point is a canonical place in the target: `2.mlp.in` and `2.mlp.out` are what MLP 2 reads and writes (its input is taken after
the norm), `2.mlp.up`, `2.mlp.gate`, `2.mlp.down`, `2.attn.q` ... are its linear maps. Reading at a linear map means the map's
input, writing there means its output. `2.mlp.up.jacobian` is the derivative of a toy's outputs by what that map gives. Activations have
shape [..., d], where ... is rows, or sequences by positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from decomp_bench.checkpoint import read_checkpoint, write_tensors
from decomp_bench.config import MethodConfig, parse
from decomp_bench.errors import UserError

if TYPE_CHECKING:
    from decomp_bench.replacement import Replaced
    from decomp_bench.stacking import StackedLoss
    from decomp_bench.targets import TargetModel

Point = str
Inputs = Mapping[Point, Tensor]
"""Activations at the positions that are replaced."""
Protocol = Literal["cascading", "clean", "single"]


class Reads(dict[Point, Tensor]):
    """Inputs of a language model with the rest of their rows, for gates that mix positions.

    `first` holds the same points at the kept first position, [B, 1, d] (empty where none is kept); `real` [B, T] says which positions of
    the whole rows are not padding (None: all).
    """

    def __init__(self, values: Inputs | None = None, first: Inputs | None = None, real: Tensor | None = None) -> None:
        super().__init__(values or {})
        self.first: dict[Point, Tensor] = dict(first or {})
        self.real = real

    def whole(self, point: Point) -> Tensor:
        """A point's activations at all positions."""
        return torch.cat([self.first[point], self[point]], 1) if point in self.first else self[point]


def layer_of(point: Point) -> int:
    """The layer that a point belongs to."""
    return int(point.split(".", 1)[0])


@dataclass(frozen=True)
class Slot:
    """Where a component reads and where it writes."""

    read: Point
    write: Point


@dataclass(frozen=True)
class Site:
    """One bank of `n` components: its layer, the points that its gates are computed from, and a slot for each place it writes to."""

    name: str
    layer: int
    gates_from: tuple[Point, ...]
    slots: tuple[Slot, ...]
    n: int

    @property
    def reads(self) -> tuple[Point, ...]:
        """The points that the site reads, in order, each once."""
        return tuple(dict.fromkeys(slot.read for slot in self.slots))


@dataclass
class SiteCodes:
    """Codes of one site for every position.

    `strength` is what a component would contribute, `gate` in [0, 1] how much of it is let through, `delta` in [0, 1] the gate of
    the dense remainder (the weight delta; None where the method has none).
    """

    strength: Float[Tensor, "*rows n"]
    gate: Float[Tensor, "*rows n"]
    delta: Float[Tensor, "*rows"] | None = None

    @property
    def value(self) -> Float[Tensor, "*rows n"]:
        """The gated strength."""
        return self.strength * self.gate

    @property
    def active(self) -> Bool[Tensor, "*rows n"]:
        """Which components are let through, however weakly."""
        return self.gate > 0


Codes = dict[str, SiteCodes]
Edit = Callable[[Site, SiteCodes], SiteCodes]


@dataclass
class Batch:
    """What a decomposer trains on and is scored on.

    `x` holds token ids [B, T] (a row is one document's chunk, beginning-of-text first, padded on the right) or a toy's inputs [B, d];
    None in a batch of activation rows. `length` is the number of real positions of each row, `doc` the document it comes from.
    `clean` maps points to the target's own activations, `logits` is the target's own output.
    """

    x: Tensor | None = None
    length: Int[Tensor, " B"] | None = None
    doc: Int[Tensor, " B"] | None = None
    clean: dict[Point, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        clean = {point: value.to(device, non_blocking=True) for point, value in self.clean.items()}
        return Batch(move(self.x), move(self.length), move(self.doc), clean, move(self.logits))


@dataclass(frozen=True)
class Choice:
    """An inference-time sparsity, as given to `Decomposer.at`: at most one of k and threshold, and how gates become masks."""

    k: int | None = None
    threshold: float | None = None
    mask: Literal["binary", "soft", "all"] | None = None
    delta: bool | None = None

    @property
    def label(self) -> str:
        """Such as `k=16` or `threshold=0.1,delta=on`; empty where nothing was chosen."""
        parts = [f"{key}={getattr(self, key):g}" for key in ("k", "threshold") if getattr(self, key) is not None]
        parts += [f"mask={self.mask}"] if self.mask else []
        parts += [f"delta={'on' if self.delta else 'off'}"] if self.delta is not None else []
        return ",".join(parts)


class Decomposer(nn.Module):
    """A decomposition of some of a frozen target's layers into sparse components.

    Subclasses set the class variables, create `self.sites` and their parameters in `build`, and implement `encode`, `decode` and
    `component_sizes`; trainable ones implement `loss`. `encode` is the only place where codes are computed, in training and in
    every evaluation alike; in training mode it may differ by its selection step only.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised whenever the method's results change, so that older runs are never taken for current ones."""
    summary: ClassVar[str] = ""
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    kind: ClassVar[Literal["replacement", "autoencoding"]] = "replacement"
    trainable: ClassVar[bool] = True
    trains_on: Literal["activations", "sequences"] = "activations"
    """Of an instance, what its config makes it train on (`trained_on`)."""
    swept: ClassVar[tuple[str, ...]] = ()
    """Which of `k`, `threshold` and `mask` `at` accepts."""
    on_demand: ClassVar[tuple[str, ...]] = ()
    """Loss terms that are next to nothing until components need reviving: their rise is no collapse of the training."""
    paper: ClassVar[str] = ""
    """What to cite."""

    sites: list[Site]
    origin: str
    """The tool that trained it, empty where that was this one."""
    label: str
    """What tells it from others of its family where `variant` does not, as for imported weights whose training is not known."""

    def __init__(self, config: MethodConfig, target: TargetModel, layers: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layers = tuple(layers)
        self.seed = seed
        self.choice = Choice()
        self.origin = self.label = ""
        self.trains_on = self.trained_on(config)
        self.sites = []
        self.bind(target)
        self.build(torch.Generator().manual_seed(target.apart + seed))

    def bind(self, target: TargetModel) -> None:
        """Attach the frozen target; it is neither a submodule nor part of the state dict."""
        object.__setattr__(self, "target", target)

    target: TargetModel

    # ---- what a method defines

    def build(self, generator: torch.Generator) -> None:
        """Create `self.sites` and the parameters, all randomness from `generator`."""
        raise NotImplementedError

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        """Codes of every site whose reads are in `inputs`.

        With `gates` (codes of another pass), support, gate and delta come from them and only the strength is recomputed; without
        them, the points in `gates_from` must be in `inputs` too.
        """
        raise NotImplementedError

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        """What replaces the target's value at `write`, from the codes of every site that writes there (`inputs` as in `encode`)."""
        raise NotImplementedError

    def component_sizes(self, site: Site) -> int | Float[Tensor, " n"]:
        """Scalars in a component's read and write vectors over all its slots: one number, or one for each component."""
        raise NotImplementedError

    def constant_size(self, write: Point) -> int:
        """Scalars at `write` that are always on (biases, a skip connection, the weight delta when it runs)."""
        return 0

    def component_coefficients(self, site: Site) -> int | Float[Tensor, " n"]:
        """Input-dependent numbers that pass through a component: its rank, one number, or one for each component."""
        return 1

    def constant_coefficients(self, write: Point) -> int:
        """Input-dependent numbers that pass through always-on parts at `write` (0 for a bias, the rank of a skip or a delta)."""
        return 0

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Named, weighted scalar terms whose sum is minimised; `progress` runs from 0 to 1 over training."""
        raise NotImplementedError

    def directions(self, site: Site, slot: Slot) -> tuple[Tensor, Tensor] | None:
        """Read vectors [n, d_in] and write vectors [n, d_out] of a slot, or None where components are not rank one."""
        return None

    def matrices(self, site: Site, slot: Slot) -> Float[Tensor, "n d_in d_out"] | None:
        """The components of a slot as whole matrices, where they are few and of a rank above one; None elsewhere."""
        return None

    @property
    def variant(self) -> str:
        """The config values that make this run a point of its curve, such as `k=16`."""
        return ""

    @property
    def family(self) -> str:
        """The curve that the run belongs to: the method and whatever else distinguishes it from sibling curves."""
        return self.name

    @property
    def init(self) -> str:
        """How components were initialised, where there is a choice."""
        return ""

    def sweep(self) -> list[Choice]:
        """The inference-time choices that an evaluation sweeps by default."""
        return []

    @classmethod
    def trained_on(cls, config: MethodConfig) -> Literal["activations", "sequences"]:
        """What the method trains on under a config: shuffled activation rows, or sequences with the target's output."""
        return cls.trains_on

    @classmethod
    def skip(cls, target: TargetModel, layers: tuple[int, ...]) -> str | None:
        """Why the method does not apply to this target and these layers, or None."""
        without = [layer for layer in layers if next(target.part(f"{layer}.mlp").parameters(), None) is None]
        return f"{target.uri} has no MLP at layer {without[0]}" if without else None

    # ---- training hooks

    def before_training(self, data: Iterator[Batch]) -> None:
        """Runs once before the first step, with training batches at hand (initial biases, faithfulness warm-up)."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: `params`, and optionally `lr`, `clip` and Adam's own options."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def after_step(self, progress: float) -> None:
        """Runs after each optimiser step (decoder norms, persistent adversaries)."""

    def restarted(self) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        """Asked for after `after_step`: rows of parameters that it set anew, whose optimiser moments then start anew too."""
        return []

    def finish(self, data: Iterator[Batch]) -> None:
        """Runs once after the last step, with training batches at hand (threshold calibration)."""

    def train_state(self) -> dict[str, Tensor]:
        """Tensors beyond the weights that a resume needs; `load_train_state` takes them back."""
        return {}

    def load_train_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `train_state` gave."""

    def step_statistics(self) -> dict[str, Tensor]:
        """Scalars of the last loss that progress shows (`l0` among them), left on the device."""
        return {}

    def stackable(self) -> int:
        """How many runs that differ from this one in their seed only are best trained in one batched step; 0: there is none for it."""
        return 0

    @classmethod
    def stacked(cls, members: Sequence[Decomposer]) -> StackedLoss:
        """Their losses in one; see `decomp_bench.stacking`."""
        raise NotImplementedError

    # ---- inherited

    def points(self) -> set[Point]:
        """Every point that the decomposition reads, gates from or writes."""
        slots = [slot for site in self.sites for slot in site.slots]
        return {p for slot in slots for p in (slot.read, slot.write)} | {p for site in self.sites for p in site.gates_from}

    def at(self, k: int | None = None, threshold: float | None = None, mask: str | None = None, delta: bool | None = None) -> Decomposer:
        """The same weights at another inference-time sparsity; raises UserError for a choice that the method does not have."""
        choice = Choice(k, threshold, mask, delta)  # type: ignore[arg-type]
        for key in ("k", "threshold", "mask", "delta"):
            if getattr(choice, key) is not None and key not in self.swept:
                raise UserError(f"{self.name} has no inference-time {key}; it has: {', '.join(self.swept) or 'none'}")
        view = copy.copy(self)
        view.choice = choice
        return view

    def replaced(
        self,
        batch: Batch,
        layers: tuple[int, ...] | None = None,
        protocol: Protocol = "cascading",
        gates: Literal["self", "clean"] | Codes = "self",
        edit: Edit | None = None,
        keep_error: bool = False,
    ) -> Replaced:
        """One pass of the target with these layers replaced; see `decomp_bench.replacement.replaced`."""
        from decomp_bench.replacement import replaced

        return replaced(self, batch, self.layers if layers is None else layers, protocol, gates, edit, keep_error)

    def save(self, folder: Path) -> None:
        """Write `decomposer.safetensors` and `decomposer.json` into a folder, atomically and without pickle."""
        from decomp_bench.files import write_json

        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(dict(self.state_dict()), folder / "decomposer.safetensors")
        about = {
            "method": self.name,
            "version": self.version,
            "config": self.config.model_dump(mode="json"),
            "layers": list(self.layers),
            "seed": self.seed,
            "target": self.target.uri,
            "target_hash": self.target.identity,
        }
        about |= {"origin": self.origin, "label": self.label} if self.origin else {}
        write_json(about, folder / "decomposer.json")

    @staticmethod
    def load(folder: Path, target: TargetModel) -> Decomposer:
        """Read what `save` wrote; raises UserError for a missing or broken checkpoint or one made for another target."""
        from decomp_bench.registry import method

        about, weights = read_checkpoint(Path(folder))
        kind = method(about["method"])
        if about["target_hash"] != target.identity:
            raise UserError(
                f"{folder} decomposes {about['target']} with weights {about['target_hash']}, not {target.uri} ({target.identity})"
            )
        made = kind(parse(kind.Config, about["config"], str(folder)), target, tuple(about["layers"]), about["seed"])
        made.origin, made.label = about.get("origin", ""), about.get("label", "")
        try:
            made.load_state_dict(weights)
        except RuntimeError:
            raise UserError(f"{folder}: the weights do not fit their config; the checkpoint is broken") from None
        return made.eval()


def replace_gate(codes: SiteCodes, gate: Tensor, delta: Tensor | None = None) -> SiteCodes:
    """The same strengths under another gate (and another gate of the remainder, where given)."""
    return replace(codes, gate=gate, delta=codes.delta if delta is None else delta)
