"""A pretended accelerator: tensors that say they are elsewhere, computed on the CPU.

An operation on tensors of two devices fails, as it does on a real one, and so does a generator of the CPU that is asked for numbers
elsewhere. Whatever makes the host wait for a real accelerator (reading a number, looking for what is not zero, copying back) is noted. It
does not pretend autocast, memory, nor the rounding of products.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
COPIES = {"copy_", "_to_copy", "set_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations that take indices of the CPU."""


OWN = tuple(f"{Path(__file__).parents[1] / name}/" for name in ("decomp_bench", "methods"))
"""Where this project's own lines are, whatever its folder is called."""


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks of a backend; to whoever looks for devices, there is none."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Elsewhere:
        about = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype, "layout": near.layout}
        made = torch.Tensor._make_wrapper_subclass(cls, near.size(), device=DEVICE, **about)  # type: ignore[attr-defined]
        made.near = near
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, [])


class Waits(TorchDispatchMode):
    """What the host has waited for, by the names of operations; while it is entered, tensors can be made on the pretended device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> Waits:
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) passes here too
        return super().__enter__()

    def __exit__(self, *about: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*about)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, self.found)


def _computed(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str]) -> Any:
    name = func.overloadpacket.__name__
    tensors = list(_tensors((*args, *kwargs.values())))
    away = [one for one in tensors if isinstance(one, Elsewhere)]
    asked = kwargs.get("device")
    given_away = bool(away) if asked is None else torch.device(asked).type == NAME
    here = [one for one in tensors if one.dim() and not isinstance(one, Elsewhere)]
    if away and here and name not in COPIES | INDEXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got both {NAME}:0 and cpu")
    generator = kwargs.get("generator")
    if generator is not None and given_away != (generator._cdata in Generator.away):
        raise RuntimeError(f"Expected a '{NAME if given_away else 'cpu'}' device type for generator but found the other ({name})")
    picked = name in INDEXING and any(one.dtype == torch.bool for one in _tensors(args[1:2]) if isinstance(one, Elsewhere))
    if away and (name in WAITS or picked or (name in COPIES and (not given_away or not isinstance(args[0], Elsewhere)))):
        waits.append(f"{'index by a mask' if picked else name} at {_place()}")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*_mapped(args, _near), **{key: _mapped(value, _near) for key, value in kwargs.items()})
    if torch.Tag.inplace_view in func.tags and away:
        with no_dispatch():  # the shape that the tensor itself says it has
            func(*args, **kwargs)
        return args[0]
    if not given_away:
        return found
    same = {id(one.near): one for one in away}  # what is changed in place stays itself
    return _mapped(found, lambda one: one if isinstance(one, Elsewhere) else same[id(one)] if id(one) in same else Elsewhere(one))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors in what an operation takes."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What an operation takes or gives, with its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_mapped(one, change) for one in value) if type(value) in (list, tuple) else value


def _near(value: torch.Tensor) -> torch.Tensor:
    return value.near if isinstance(value, Elsewhere) else value


def _place() -> str:
    """The line of this project that called, such as `methods/_topk.py:12`."""
    frame = sys._getframe(1)
    while frame.f_back and not frame.f_code.co_filename.startswith(OWN):
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


class Generator(torch.Generator):
    """A generator of either device."""

    away: set[int] = set()  # noqa: RUF012 - of the class, by their addresses: what operations are given is another object

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls)
        made._elsewhere = torch.device(device).type == NAME  # type: ignore[attr-defined]
        (cls.away.add if made._elsewhere else cls.away.discard)(made._cdata)  # type: ignore[attr-defined]
        return made

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return DEVICE if self._elsewhere else torch.device("cpu")  # type: ignore[attr-defined]


_apply = nn.Module._apply


def _moved(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """A module's parameters stay the same objects when they change their device, as they do on a real one."""
    for own in (parameter for part in module.modules() for parameter in part._parameters.values() if parameter is not None):
        with torch.no_grad():
            value = fn(own.data)
        if isinstance(value, Elsewhere) != isinstance(own, Elsewhere):
            other = nn.Parameter(value, own.requires_grad)
            own.__class__, other.__class__ = other.__class__, own.__class__
            own.__dict__, other.__dict__ = other.__dict__, own.__dict__
            torch._C._swap_tensor_impl(own, other)
    return _apply(module, fn, recurse)


def _opened(opener: Any) -> Any:
    """safetensors' own opener, which knows no pretended device."""

    @contextmanager
    def safe_open(file: Any, device: str = "cpu", **more: Any) -> Iterator[Any]:
        away = torch.device(device).type == NAME
        with opener(file, device="cpu" if away else device, **more) as opened:
            yield SimpleNamespace(get_tensors=lambda: {k: v.to(DEVICE) for k, v in opened.get_tensors().items()}) if away else opened

    return safe_open


@contextmanager
def pretend(monkeypatch: Any) -> Iterator[Waits]:
    """Have the device `pretended` here, and see what is waited for."""
    with monkeypatch.context() as patch, Waits() as waits:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(nn.Module, "_apply", _moved)
        patch.setattr(safetensors.torch, "safe_open", _opened(safetensors.torch.safe_open))
        yield waits
