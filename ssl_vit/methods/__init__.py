"""Methods by name, and what they say of themselves, found without torch where they allow it."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import is_dataclass
from typing import NamedTuple

from ssl_vit import options
from ssl_vit.common.errors import UserError, check, did_you_mean
from ssl_vit.common.scalars import Scalar
from ssl_vit.options.base import Defaults, MethodConfig


class MethodOptions(NamedTuple):
    """Options of a method: their class, and the method's values for the shared groups. For a
    report, too: its name for people, and what each of its scalars means."""

    config: type[MethodConfig]
    defaults: Defaults
    title: str
    explained: dict[str, Scalar]


def method_names() -> list[str]:
    """The methods there are: the modules of ``methods/`` but ``base`` and those of ``_names``."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def check_name(name: str) -> None:
    """Check that there is a method of this name.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    names = method_names()
    allowed = f"it must be one of {', '.join(names)}{did_you_mean(name, names)}"
    check(name in names, f"method is {name!r}; {allowed}")


def method_of(recipe: str) -> str:
    """The method of a recipe by its name, METHOD_ANYTHING; empty: it begins with none."""
    own = [name for name in method_names() if recipe.startswith(f"{name}_")]
    return max(own, key=len, default="")


def find_options(name: str) -> MethodOptions:
    """Options of the method ``name``: those of ``options/<name>.py``; of a method that has no such
    file, those that it says itself, which takes an import of torch.

    Raises:
        UserError: no such method (the nearest name is given), or its file is wrong.
    """
    check_name(name)
    if any(m.name == name for m in pkgutil.iter_modules(options.__path__)):
        return _options_apart(name)
    from ssl_vit.methods.base import find_method

    method = find_method(name)
    return MethodOptions(method.Config, method.defaults, method.title, method.explained)


def _options_apart(name: str) -> MethodOptions:
    """Options as ``options/<name>.py`` has them.

    Raises:
        UserError: it cannot be imported, or lacks something.
    """
    file = f"options/{name}.py"
    try:
        module = importlib.import_module(f"{options.__name__}.{name}")
    except Exception as error:
        raise UserError(f"{file} cannot be imported: {error!r}") from error
    own = [
        kind
        for kind in vars(module).values()
        if is_dataclass(kind)
        and isinstance(kind, type)
        and issubclass(kind, MethodConfig)
        and kind.__module__ == module.__name__
        and kind.prefix == MethodConfig.prefix
    ]
    named = ", ".join(kind.__name__ for kind in own) or "none"
    check(
        len(own) == 1,
        f"{file} must define one frozen dataclass on MethodConfig; it defines {len(own)} ({named})",
    )
    lacking = [key for key in ("DEFAULTS", "TITLE", "EXPLAINED") if not hasattr(module, key)]
    check(
        not lacking,
        f"{file} lacks {', '.join(lacking)}; beside the options it must say DEFAULTS (values of "
        "shared options, or {}), TITLE (the method's name for people) and EXPLAINED (its scalars)",
    )
    return MethodOptions(own[0], module.DEFAULTS, module.TITLE, module.EXPLAINED)
