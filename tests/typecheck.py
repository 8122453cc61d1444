"""Runtime checks of annotated shapes: jaxtyping's import hook puts `typecheck` around the package's functions that take or give arrays.

A function without arrays is left alone: its types are basedpyright's business, and wrapping every call of it takes two fifths of the
tests' time. So is one defined inside another, which would be wrapped anew each time it is made.
"""

from __future__ import annotations

import re
import sys
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is fine where a float is meant

_wrapped = jaxtyping.jaxtyped
_NAME = re.compile(r"[A-Za-z_]\w*")


def install() -> None:
    """Check shapes on every call; before any import of the package."""
    jaxtyping.jaxtyped = _where_arrays_are
    jaxtyping.install_import_hook("decomp_bench", f"{__name__}.typecheck")


def _where_arrays_are(*, typechecker: Any) -> Any:
    """The decorator that the import hook writes into every module."""
    wrap = _wrapped(typechecker=typechecker)
    return lambda made: wrap(made) if takes_arrays(made) else made


def takes_arrays(made: Any) -> bool:
    """Whether a class or a function of a module has an array among its annotations."""
    function = getattr(made, "fget", made)  # a property
    function = getattr(function, "__func__", function)  # a static or class method
    if "<locals>" in function.__qualname__:
        return False
    scope = vars(sys.modules[function.__module__])
    names = {name for annotation in getattr(function, "__annotations__", {}).values() for name in _NAME.findall(str(annotation))}
    return any(_is_array(scope.get(name)) for name in names)


def _is_array(kind: Any) -> bool:
    return getattr(kind, "__module__", None) == "jaxtyping" or any(_is_array(part) for part in get_args(kind))
