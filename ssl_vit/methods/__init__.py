"""Methods by name, and their options, which are found without torch where a method allows it."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import is_dataclass
from typing import NamedTuple

from ssl_vit import options
from ssl_vit.options.base import Defaults, MethodConfig


class MethodOptions(NamedTuple):
    """Options of a method: their class, and the method's values for the shared groups."""

    config: type[MethodConfig]
    defaults: Defaults


def method_names() -> list[str]:
    """The methods there are: the modules of ``methods/`` but ``base`` and those of ``_names``."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def find_options(name: str) -> MethodOptions:
    """Options of the method ``name``: those of ``options/<name>.py``; of a method that has no such
    file, those that it says itself, which takes an import of torch.

    Raises:
        UserError: no such method (the nearest name is given), or its file is wrong.
    """
    apart = name in method_names() and any(
        m.name == name for m in pkgutil.iter_modules(options.__path__)
    )
    if not apart:
        from ssl_vit.methods.base import find_method

        method = find_method(name)
        return MethodOptions(method.Config, method.defaults)
    module = importlib.import_module(f"ssl_vit.options.{name}")
    (own,) = (
        kind
        for kind in vars(module).values()
        if is_dataclass(kind)
        and isinstance(kind, type)
        and issubclass(kind, MethodConfig)
        and kind.__module__ == module.__name__
        and kind.prefix == MethodConfig.prefix
    )
    return MethodOptions(own, module.DEFAULTS)
