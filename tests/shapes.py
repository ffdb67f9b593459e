"""Checks of what signatures say: of shapes by jaxtyping, of types by beartype alone.

jaxtyping compiles two checks of a function whenever its ``def`` is reached, also of a function
within another at each call of that one, for milliseconds. Here it does so when a function is first
called, and only if its annotations name shapes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import jaxtyping
from beartype.door import die_if_unbearable
from beartype.roar import BeartypeCallHintForwardRefException, BeartypeCallHintViolation

_CHECKED_BY_JAXTYPING = jaxtyping.jaxtyped


class Asked:
    """What annotations ask of a function's values; found out when it is first called.

    By then all that they name is there. What cannot be resolved asks nothing.
    """

    def __init__(self, fn: Any) -> None:
        code = fn.__code__
        self.annotations, self.globals = fn.__annotations__, fn.__globals__
        self.positional = code.co_varnames[: code.co_argcount]
        rest = code.co_argcount + code.co_kwonlyargcount
        self.rest = code.co_varnames[rest] if code.co_flags & 0x04 else ""  # the name of *args

    @functools.cached_property
    def named(self) -> dict[str, Any]:
        """The annotation of each argument that has one, and of what is returned."""
        return {name: self._resolved(hint) for name, hint in self.annotations.items()}

    @functools.cached_property
    def shapes(self) -> bool:
        """Whether any of them is one of jaxtyping's, or has one in it."""
        return any("jaxtyping." in repr(hint) for hint in self.named.values())

    @functools.cached_property
    def placed(self) -> list[tuple[int, Any]]:
        """The annotations of positional arguments, with their places."""
        names = enumerate(self.positional)
        return [(place, self.named[name]) for place, name in names if name in self.named]

    def _resolved(self, hint: Any) -> Any:
        def holder() -> None: ...

        holder.__annotations__ = {"it": hint}
        try:
            return get_type_hints(holder, self.globals, include_extras=True)["it"]
        except Exception:
            return Any

    def of_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check what a function is given."""
        for place, hint in self.placed:
            if place >= len(args):
                break
            _check(args[place], hint)
        if self.rest in self.named:
            for value in args[len(self.positional) :]:
                _check(value, self.named[self.rest])
        for name, value in kwargs.items():
            if name in self.named:
                _check(value, self.named[name])

    def of_result(self, result: Any) -> None:
        """Check what it returns."""
        if "return" in self.named:
            _check(result, self.named["return"])


def _check(value: Any, hint: Any) -> None:
    if type(value) is not hint:
        # The bound of a type variable may be a name that only its own module knows.
        with suppress(BeartypeCallHintForwardRefException):
            die_if_unbearable(value, hint)


# Of each function by its place in the source: a function within another is made again and again.
_ASKED: dict[tuple[str, str, int], Asked] = {}


def checked(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """``jaxtyping.jaxtyped``, as its import hook applies it to functions and classes."""
    if fn is None:
        return functools.partial(checked, typechecker=typechecker)
    if isinstance(fn, type):
        if is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = checked(fn.__init__, typechecker=typechecker)
        return fn
    if not fn.__annotations__:
        return fn
    key = (fn.__module__, fn.__qualname__, fn.__code__.co_firstlineno)
    asked = _ASKED.setdefault(key, Asked(fn))
    by_jaxtyping: list[Any] = []

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if asked.shapes:
            if not by_jaxtyping:
                by_jaxtyping.append(_CHECKED_BY_JAXTYPING(fn, typechecker=typechecker))
            return by_jaxtyping[0](*args, **kwargs)
        try:
            asked.of_arguments(args, kwargs)
        except BeartypeCallHintViolation as error:
            inspect.signature(fn).bind(*args, **kwargs)  # what is no call at all says so first
            raise jaxtyping.TypeCheckError(f"{fn.__qualname__}: {error}") from error
        result = fn(*args, **kwargs)
        try:
            asked.of_result(result)
        except BeartypeCallHintViolation as error:
            raise jaxtyping.TypeCheckError(f"result of {fn.__qualname__}: {error}") from error
        return result

    return call
