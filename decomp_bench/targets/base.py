"""A frozen model behind one face: capture at points, replace modules, logits, identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decomp_bench.errors import UserError

if TYPE_CHECKING:
    from decomp_bench.targets.toys.truth import Toy


JACOBIAN = ".jacobian"
"""After a linear map's point: derivatives [rows, outputs, d] of all outputs of a toy by what the map gives."""


@dataclass(frozen=True)
class Architecture:
    """Where a family of models keeps its parts: module paths, `{}` standing for the layer."""

    block: str
    mlp: str
    attn: str | None
    maps: Mapping[str, str]
    """Canonical name (`mlp.up`, `attn.q`) to module path."""
    body: str | None = None
    """Path of the model without its output head; None: the model itself."""


TOY_STREAM = 2_000_000
"""What toys set `TargetModel.apart` to."""


class TargetModel:
    """A frozen network in evaluation mode.

    `uri` names it, `identity` is a hash of its weights (default: of the module as it is given), `layers` counts blocks, `width` is the
    residual width. `task` is `lm` for a language model (token ids [B, T] in, logits [B, T, vocab] out; compared by KL) and `regression`
    for a toy (rows in, rows out; compared by squared error). `keeps_first` says that the first position of a row is never replaced nor
    scored. `toy` holds the data and the truth of a toy whose mechanisms are known.
    """

    toy: Toy | None = None
    apart: int = 0
    """Added to the seeds of decomposers, so that none begins with the numbers that drew a toy of its seed."""
    separator: int | None = None
    """Where attention is confined to documents (`confine`), the token that ends one."""
    _masked_outright = False

    def __init__(
        self,
        uri: str,
        module: nn.Module,
        architecture: Architecture,
        layers: int,
        width: int,
        task: Literal["lm", "regression"],
        tokenizer: Any = None,
        context: int = 0,
        device: str | torch.device = "cpu",
        about: dict[str, Any] | None = None,
        identity: str | None = None,
    ) -> None:
        self.uri, self.module, self.architecture = uri, module.eval().requires_grad_(False).to(device), architecture
        self.layers, self.width, self.task = layers, width, task
        self.tokenizer, self.context, self.about = tokenizer, context, about or {}
        self.identity = identity or identity_of(module)
        modules = dict(module.named_modules())
        self._places = _places(module)
        self._parameter = next(self.module.parameters())  # finding it takes a walk over all modules, and `device` is asked for often
        self.map_paths = {
            f"{layer}.{name}": path.format(layer)
            for layer in range(layers)
            for name, path in architecture.maps.items()
            if path.format(layer) in modules
        }

    bridge: Any = None
    """TransformerLens' bridge around the module, for its hooks; None for targets of other schemes."""

    @property
    def is_lm(self) -> bool:
        return self.task == "lm"

    @property
    def keeps_first(self) -> bool:
        return self.task == "lm"

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    def to(self, device: str | torch.device) -> TargetModel:
        """Move the weights; returns itself."""
        self.module.to(device)
        return self

    # ---- places

    def path(self, point: str) -> str:
        """Module path behind a point's prefix: `2.mlp` and `2.attn` units, `2` a block, `2.mlp.up` a linear map."""
        if point in self.map_paths:
            return self.map_paths[point]
        layer, _, part = point.partition(".")
        template = {"": self.architecture.block, "mlp": self.architecture.mlp, "attn": self.architecture.attn}.get(part)
        if template is None or not layer.isdigit() or int(layer) >= self.layers:
            raise UserError(f"{self.uri} has no point '{point}'; linear maps of a layer: {', '.join(sorted(self.architecture.maps))}")
        return template.format(layer)

    def part(self, point: str) -> nn.Module:
        """The module behind a point's prefix, as in `path`."""
        return self.module.get_submodule(self.path(point))

    def maps(self, layer: int, unit: str = "mlp") -> list[str]:
        """Points of a unit's linear maps, in the order in which the unit runs them."""
        return [p for p in self.map_paths if p.startswith(f"{layer}.{unit}.")]

    def weight(self, point: str) -> Float[Tensor, "d_out d_in"]:
        """Weight of a linear map in fp32, oriented like nn.Linear; a copy where the target holds it in 16 bits."""
        return self.part(point).weight.float()  # type: ignore[union-attr, operator]

    def bias(self, point: str) -> Float[Tensor, " d_out"] | None:
        """Bias of a linear map, or None."""
        return self.part(point).bias  # type: ignore[return-value]

    def size(self, point: str) -> int:
        """Width of the activations read at a point."""
        return self.part(point).weight.shape[1] if point in self.map_paths else self.width  # type: ignore[union-attr, index]

    def layer_tuple(self, layers: tuple[int, ...] | Literal["all"]) -> tuple[int, ...]:
        """`all` or a choice of layers as a sorted tuple; raises UserError for a layer that the target lacks."""
        if layers == "all":
            return tuple(range(self.layers))
        wrong = [layer for layer in layers if not 0 <= layer < self.layers]
        if wrong or not layers:
            raise UserError(f"{self.uri} has layers 0 to {self.layers - 1}; got {', '.join(map(str, wrong)) or 'none'}")
        return tuple(sorted(set(layers)))

    # ---- running

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output: logits [B, T, vocab], or a toy's output rows."""
        return self.module(**self._given(x)).logits if self.is_lm else self.module(x)

    def body(self, x: Tensor) -> None:
        """Run everything but the output head, for what is captured on the way."""
        if self.is_lm and self.architecture.body:
            self.module.get_submodule(self.architecture.body)(**self._given(x))
        else:
            self(x)

    def _given(self, x: Int[Tensor, "B T"]) -> dict[str, Any]:
        given: dict[str, Any] = {"input_ids": x, "use_cache": False}
        if self.separator is None:
            return given
        places = places_in_documents(x, self.separator)
        return {**given, "position_ids": places, **({"attention_mask": document_mask(places)} if self._masked_outright else {})}

    def confine(self, separator: int | None) -> None:
        """Confine attention to documents, each of which ends with this token and counts its places anew; None lets it cross them again.

        transformers makes the mask from places that start again; where it does not (tried out on a row), the mask is given as it is.
        Raises UserError where a position sees the document before even so.
        """
        self.separator, self._masked_outright = separator, False
        if separator is None or not self.is_lm or self._confined(separator):
            return
        self._masked_outright = True
        if not self._confined(separator):
            self.separator = None
            raise UserError(f"{self.uri}: its attention cannot be confined to documents: set data.packing=packed or none")

    @torch.no_grad()
    def _confined(self, separator: int) -> bool:
        words = [token for token in range(9) if token != separator]
        x = torch.tensor([[*words[:3], separator, *words[6:8]], [*words[3:6], separator, *words[6:8]]], device=self.device)
        seen = self(x)[:, -2:].float()
        return float((seen[0] - seen[1]).abs().max()) <= 1e-4 * max(1.0, float(seen.abs().max()))

    @torch.no_grad()
    def clean(self, x: Tensor, points: Iterable[str], logits: bool = True) -> tuple[dict[str, Tensor], Tensor | None]:
        """Activations at points and, if asked, the output, of the untouched model. `2.resid` is what block 2 reads.

        `2.mlp.up.jacobian` is the derivative of a toy's outputs by what that map gives; raises UserError for a language model's.
        """
        derived = sorted({point for point in points if point.endswith(JACOBIAN)})
        found = self._jacobians(x, derived) if derived else {}
        handles = [self._capture(point, found) for point in sorted(set(points).difference(derived))]
        try:
            output = self(x) if logits else self.body(x)
        finally:
            for handle in handles:
                handle.remove()
        return found, output

    @torch.enable_grad()
    def _jacobians(self, x: Tensor, points: list[str]) -> dict[str, Tensor]:
        if self.is_lm:
            raise UserError(f"{self.uri}: derivatives of every output are taken of toys only; a language model has too many")
        given: dict[str, Tensor] = {}

        def keep(point: str):
            def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
                given[point] = output if output.requires_grad else output.requires_grad_()
                return given[point]

            return self.part(point.removesuffix(JACOBIAN)).register_forward_hook(hook)

        handles = [keep(point) for point in points]
        try:
            output = self(x)
        finally:
            for handle in handles:
                handle.remove()
        each = torch.eye(output.shape[1], device=output.device)[:, None].expand(-1, len(output), -1)
        derivatives = torch.autograd.grad(output, [given[point] for point in points], each, is_grads_batched=True)
        return {point: value.transpose(0, 1) for point, value in zip(points, derivatives, strict=True)}

    def _capture(self, point: str, found: dict[str, Tensor]):
        prefix, _, end = point.rpartition(".")
        if point in self.map_paths:
            prefix, end = point, "in"
        module = self.part(prefix)
        if end == "out":

            def keep_output(_module: nn.Module, _args: tuple, output: Any) -> None:
                found[point] = output[0] if isinstance(output, tuple) else output

            return module.register_forward_hook(keep_output)

        def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            found[point] = args[0] if args else kwargs["hidden_states"]

        return module.register_forward_pre_hook(keep, with_kwargs=True)

    @cached_property
    def block_gives_tuple(self) -> bool:
        """Whether a block returns a tuple that begins with the residual stream, and not the stream itself."""
        if not self.is_lm:
            return False
        found: list[bool] = []
        handle = self.part("0").register_forward_hook(lambda _module, _args, output: found.append(isinstance(output, tuple)))
        try:
            with torch.no_grad():
                self.body(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        finally:
            handle.remove()
        return found[0]

    @contextmanager
    def swapped(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Put modules in place of those at these paths while the context lasts, and the originals back whatever happens."""
        places: list[tuple[nn.Module, str, nn.Module]] = []  # found before anything moves: paths of inner modules lead through outer ones
        for path, module in modules.items():
            for place in self._places.get(path, (path,)):
                parent, _, name = place.rpartition(".")
                places.append((self.module.get_submodule(parent), name, module))
        originals = [parent._modules[name] for parent, name, _ in places]
        try:
            for parent, name, module in places:
                parent._modules[name] = module
            yield
        finally:
            for (parent, name, _), original in zip(places, originals, strict=True):
                parent._modules[name] = original


def places_in_documents(x: Int[Tensor, "B T"], separator: int) -> Int[Tensor, "B T"]:
    """Each position's place in its document, from 0; a document ends with the separator, and a row begins one."""
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    begins = torch.zeros_like(place)
    begins[:, 1:] = torch.where(x[:, :-1] == separator, place[:, 1:], 0)
    return place - begins.cummax(1).values


def document_mask(places: Int[Tensor, "B T"]) -> Float[Tensor, "B 1 T T"]:
    """What is added to attention scores so that a position sees those before it in its own document, from places in documents."""
    count = torch.arange(places.shape[1], device=places.device)
    begins = count - places
    seen = (begins[:, :, None] == begins[:, None, :]) & (count[:, None] >= count)
    return torch.zeros(seen.shape, device=places.device).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def _places(module: nn.Module) -> dict[str, list[str]]:
    """Every path of those modules that have several (one wrapped by a bridge is known to the bridge and to the wrapped model)."""
    paths: dict[int, list[str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(part), []).append(path)
    return {path: several for several in paths.values() if len(several) > 1 for path in several}


def identity_of(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers: names, shapes and values (16 hex digits)."""
    state = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        state.update(f"{name}{tuple(value.shape)}".encode())
        state.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return state.hexdigest()[:16]
