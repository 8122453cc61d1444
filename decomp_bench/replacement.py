"""The one forward pass with parts replaced, for every method and protocol.

The unit of replacement is a layer's MLP (or its attention, where a method writes at attention maps). Under `cascading` every unit
encodes the already replaced stream. Under `clean` each unit is fed its clean input, and all are replaced; inside a unit, later maps
read the replaced hidden layer. Under `single` one layer is replaced and the rest is clean; sources at other layers are clean.
The first position of a language model's row is never replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from decomp_bench.conditions import GLOBAL_GATE
from decomp_bench.decomposer import Batch, Codes, Decomposer, Edit, Point, Protocol, Reads, Site, layer_of
from decomp_bench.errors import UserError
from decomp_bench.targets.base import TargetModel


@dataclass
class Replaced:
    """What one pass gives: logits, the codes of every site that ran, each replaced MLP's output by layer, and what was read at points.

    For a language model, codes, outputs and inputs start at position 1, since position 0 is kept; `clean_rows` trims clean activations
    alike.
    """

    logits: Tensor
    codes: Codes = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[Point, Tensor] = field(default_factory=dict)


def clean_points(decomposer: Decomposer, layers: tuple[int, ...] | None = None) -> set[Point]:
    """Clean activations that a batch must carry for every protocol: the decomposition's points, unit inputs and outputs, block inputs."""
    units = {unit_of(point) for point in decomposer.points()}
    target = decomposer.target
    points = decomposer.points() | {f"{unit}.in" for unit in units}
    points |= {f"{layer}.mlp.out" for layer in (layers if layers is not None else decomposer.layers)}
    return points | ({f"{layer}.resid" for layer in range(1, target.layers)})


def unit_of(point: Point) -> str:
    """The unit that a point belongs to: `2.mlp` for `2.mlp.up`."""
    return ".".join(point.split(".")[:2])


def clean_rows(decomposer: Decomposer, value: Tensor) -> Tensor:
    """A clean activation at the positions that are replaced."""
    return value[:, 1:] if decomposer.target.keeps_first else value


def clean_codes(decomposer: Decomposer, batch: Batch) -> Codes:
    """Codes of every site on the clean activations: where `gates=clean` takes its gates from."""
    return decomposer.encode(clean_reads(decomposer, batch))


def clean_reads(decomposer: Decomposer, batch: Batch) -> Reads:
    """What `encode` is given of the clean pass."""
    points = decomposer.points() & batch.clean.keys()
    first = {point: batch.clean[point][:, :1] for point in points} if decomposer.target.keeps_first else {}
    return Reads({point: clean_rows(decomposer, batch.clean[point]) for point in points}, first, _real(batch))


def _real(batch: Batch) -> Tensor | None:
    """Which positions [B, T] are not padding; None for a toy's rows."""
    if batch.length is None or batch.x is None:
        return None
    return torch.arange(batch.x.shape[1], device=batch.x.device) < batch.length[:, None]


def replaced(
    decomposer: Decomposer,
    batch: Batch,
    layers: tuple[int, ...],
    protocol: Protocol = "cascading",
    gates: Literal["self", "clean"] | Codes = "self",
    edit: Edit | None = None,
    keep_error: bool = False,
    forward: Callable[[Tensor], Tensor] | None = None,
    first: int | None = None,
) -> Replaced:
    """Run the target with the decomposition in place of these layers.

    `gates`: `self` computes gates from the stream of this pass, `clean` from the clean pass, and codes given are used as they are.
    `edit(site, codes)` runs once for each site in execution order. With `keep_error` a place gives f(x) + decode(edited) -
    decode(unedited), so that an edit is measured without the reconstruction error. Gradients flow unless the caller forbids it.
    `forward` runs the model in another way (with a key-value cache, say) and `first` says how many leading positions are kept there.
    """
    target = decomposer.target
    if not layers:
        assert batch.x is not None
        return Replaced((forward or target)(batch.x))
    if protocol == "single" and len(layers) != 1:
        raise ValueError("protocol 'single' replaces one layer at a time")
    given = clean_codes(decomposer, batch) if gates == "clean" else gates if isinstance(gates, dict) else None
    run = _Pass(decomposer, batch, layers, protocol, given, edit, keep_error, first)
    modules = run.modules()
    assert batch.x is not None
    with target.swapped(modules) if modules else nullcontext():
        logits = (forward or target)(batch.x)
    return Replaced(logits, run.codes, run.outputs, run.inputs)


class _Pass:
    """State of one replaced pass: what has been read, encoded and written so far."""

    def __init__(
        self,
        decomposer: Decomposer,
        batch: Batch,
        layers: tuple[int, ...],
        protocol: Protocol,
        gates: Codes | None,
        edit: Edit | None,
        keep_error: bool,
        first: int | None,
    ) -> None:
        self.decomposer, self.batch, self.layers, self.protocol = decomposer, batch, set(layers), protocol
        self.given, self.edit, self.keep_error = gates, edit, keep_error
        self.first = int(decomposer.target.keeps_first) if first is None else first
        self.inputs = Reads(real=_real(batch))
        self.codes: Codes = {}
        self.unedited: Codes = {}
        self.outputs: dict[int, Tensor] = {}
        slots = [slot for site in decomposer.sites for slot in site.slots]
        self.writes = {slot.write for slot in slots if layer_of(slot.write) in self.layers}
        self.sites = [site for site in decomposer.sites if any(slot.write in self.writes for slot in site.slots)]
        if protocol != "cascading":
            self._encode_clean_sources()

    def _encode_clean_sources(self) -> None:
        """Under clean inputs, sites that read a unit's input at an earlier layer than any replaced one see the clean activation."""
        for site in self.sites:
            for point in site.reads:
                if layer_of(point) not in self.layers:
                    self.read(point, self.batch.clean[point])

    def modules(self) -> dict[str, nn.Module]:
        """Path -> module to put there: observed or replaced units, replaced maps, and the skipped prefix of a single-layer pass."""
        target = self.decomposer.target
        points = self.writes | {p for site in self.sites for p in (*site.reads, *site.gates_from)}
        units = {unit_of(p) for p in points if self.protocol == "cascading" or layer_of(p) in self.layers}
        made: dict[str, nn.Module] = {}
        for unit in sorted(units):
            made[target.path(unit)] = _Unit(self, unit, target.part(unit))
        for point in sorted(self.writes & target.map_paths.keys()):
            made[target.path(point)] = _Map(self, point, target.part(point))
        if self.protocol == "single":
            made |= _skipped_prefix(target, self.batch, min(self.layers))
        return made

    def read(self, point: Point, x: Tensor) -> None:
        """Take note of what is read at a point at all positions, and encode the sites that this completes, each once, with its edit."""
        self.inputs[point] = x[:, self.first :] if self.first else x
        if self.first:
            self.inputs.first[point] = x[:, : self.first]
        for site in self.sites:
            if site.name not in self.codes and point in site.reads and all(p in self.inputs for p in site.reads):
                self._encode(site)

    def _encode(self, site: Site) -> None:
        needed = site.reads if self.given is not None else (*site.reads, *site.gates_from)
        if any(point not in self.inputs for point in needed):
            raise UserError(f"{site.name} takes its gates from the clean pass only: {GLOBAL_GATE}")
        inputs = Reads({point: self.inputs[point] for point in needed}, self.inputs.first, self.inputs.real)
        codes = self.decomposer.encode(inputs, self.given)[site.name]
        self.unedited[site.name] = codes
        self.codes[site.name] = self.edit(site, codes) if self.edit else codes

    def write(self, point: Point, original: Tensor | None) -> Tensor:
        """The replacement's value at a point."""
        value = self.decomposer.decode(self.codes, point, self.inputs)
        if self.keep_error:
            assert original is not None
            value = original + (value - self.decomposer.decode(self.unedited, point, self.inputs))  # exactly the original without an edit
        return value


def _skipped_prefix(target: TargetModel, batch: Batch, start: int) -> dict[str, nn.Module]:
    """Stand-ins for the blocks before the first replaced one, where the clean residual stream after them is known."""
    resid = batch.clean.get(f"{start}.resid")
    if resid is None or not start:
        return {}
    output = (resid, None) if target.block_gives_tuple else resid
    return {target.path(str(layer)): _Skip(output, target.part(str(layer))) for layer in range(start)}


class _StandIn(nn.Module):
    """Stands for a module of the target, and has its attributes (a model may read a block's attention type)."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class _Skip(_StandIn):
    """Stands for a block before the replaced layer: the residual stream after it is known."""

    def __init__(self, output: Tensor | tuple, original: nn.Module) -> None:
        super().__init__(original)
        self.output = output

    def forward(self, *_args, **_kwargs) -> Tensor | tuple:
        return self.output


class _Unit(_StandIn):
    """Stands for an MLP or attention module: observes what it reads, and replaces what it writes where asked."""

    def __init__(self, run: _Pass, unit: str, original: nn.Module) -> None:
        super().__init__(original)
        self.run, self.unit = run, unit
        self.replaces_output = f"{unit}.out" in run.writes
        self.sees_output = any(f"{unit}.out" in site.reads for site in run.sites)

    def forward(self, *args, **kwargs):
        run, first = self.run, self.run.first
        x = args[0] if args else kwargs["hidden_states"]
        if run.protocol != "cascading" and f"{self.unit}.in" in run.batch.clean:
            x = run.batch.clean[f"{self.unit}.in"]
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        run.read(f"{self.unit}.in", x)
        if not self.replaces_output:
            return self._observed(self.original(*args, **kwargs))
        whole = self.sees_output or run.keep_error
        original = self.original(x) if whole else None
        kept = original[:, first:] if original is not None and first else original
        if self.sees_output:
            run.read(f"{self.unit}.out", original)  # type: ignore[arg-type]
        value = run.write(f"{self.unit}.out", kept)
        run.outputs[int(self.unit.split(".")[0])] = value
        if not first:
            return value
        return torch.cat([original[:, :1] if original is not None else self.original(x[:, :1]), value], 1)

    def _observed(self, output):
        """Pass an output through, noting it where the unit's maps were replaced or a site reads it."""
        value = output[0] if isinstance(output, tuple) else output
        trimmed = value[:, self.run.first :] if self.run.first else value
        if self.sees_output:
            self.run.read(f"{self.unit}.out", value)
        layer, kind = self.unit.split(".")
        if kind == "mlp" and int(layer) in self.run.layers and any(unit_of(w) == self.unit for w in self.run.writes):
            self.run.outputs[int(layer)] = trimmed
        return output


class _Map(_StandIn):
    """Stands for a linear map whose components are decomposed."""

    def __init__(self, run: _Pass, point: Point, original: nn.Module) -> None:
        super().__init__(original)
        self.run, self.point = run, point

    def forward(self, x: Tensor) -> Tensor:
        run, first = self.run, self.run.first
        run.read(self.point, x)
        original = self.original(x) if run.keep_error else None
        value = run.write(self.point, original[:, first:] if original is not None and first else original)
        if not first:
            return value
        return torch.cat([original[:, :1] if original is not None else self.original(x[:, :1]), value], 1)


class _Constant(_StandIn):
    """Stands for an MLP whose output is a constant; the kept first position is the target's own."""

    def __init__(self, value: Tensor, original: nn.Module, first: int) -> None:
        super().__init__(original)
        self.value, self.first = value, first

    def forward(self, x: Tensor) -> Tensor:
        filled = self.value.expand(*x.shape[:-1], -1)
        return torch.cat([self.original(x[:, :1]), filled[:, 1:]], 1) if self.first else filled


def ablated(target: TargetModel, batch: Batch, constants: dict[int, Tensor]) -> Tensor:
    """The target's output with the MLPs of some layers giving a constant [d] each: the bases that recovered shares refer to."""
    assert batch.x is not None
    first = int(target.keeps_first)
    modules = {target.path(f"{layer}.mlp"): _Constant(value, target.part(f"{layer}.mlp"), first) for layer, value in constants.items()}
    with target.swapped(modules | _skipped_prefix(target, batch, min(constants, default=0))):
        return target(batch.x)
