"""Checks of what signatures say: of shapes by jaxtyping, of other types by beartype alone.

jaxtyping binds and checks the arguments of a call twice, also where no shape is named; and it
compiles a function within another anew at each call of that one, for milliseconds: those are left
out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_SHAPES = re.compile(r"\b(Bool|Float|Int|Integer|Shaped|UInt)\d*\[")
_CHECKED = jaxtyping.jaxtyped
_TYPES = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def checked(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """``jaxtyping.jaxtyped``, as its import hook applies it to every function and class."""
    if fn is None:
        return functools.partial(checked, typechecker=typechecker)
    if isinstance(fn, type):
        return _CHECKED(fn, typechecker=typechecker)
    if "<locals>" in fn.__qualname__ or not fn.__annotations__:
        return fn
    named = any(_SHAPES.search(str(hint)) for hint in fn.__annotations__.values())
    # What only a type checker imports is not there to be compared with; jaxtyping lets it pass.
    if named or "TYPE_CHECKING" in fn.__globals__:
        return _CHECKED(fn, typechecker=typechecker)
    return _TYPES(fn)
