"""Pickled values allowed in a weight file, each read by an inert stand-in.

Training scripts store their options and scores beside the weights: ``argparse`` namespaces, paths,
numbers and arrays of numpy. None of the classes named in a file is called: paths become pure ones,
which touch no disk, numbers become Python's, and arrays are passed over, as numpy's own functions
interpret bytes of the file as whatever type the file says.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

_NUMBER = re.compile(r"[biufc]\d{1,2}|[SU]\d{1,6}")


class _Dtype:
    """Stand-in for ``numpy.dtype``: its code and byte order."""

    def __init__(self, code: str, *flags: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


class _Array:
    """Stand-in for ``numpy.ndarray``, which keeps nothing."""

    def __setstate__(self, state: object) -> None:
        """Pass over shape, type and bytes."""


def _array(*parts: object) -> _Array:
    """Stand-in for numpy's ``_reconstruct``."""
    return _Array()


def _number(dtype: object, raw: object = b"") -> bool | int | float | complex | str | bytes:
    """Stand-in for numpy's ``scalar``: the Python number (or text) of its bytes.

    Raises:
        ValueError: a type of numpy that is no number, or other bytes than it takes.
    """
    if not isinstance(dtype, _Dtype) or not _NUMBER.fullmatch(dtype.code):
        raise ValueError("a scalar of numpy that is no number")
    if not isinstance(raw, bytes):
        raise ValueError("a scalar of numpy without its bytes")
    value: bool | int | float | complex | str | bytes
    (value,) = np.frombuffer(raw, dtype.order + dtype.code).tolist()
    return value


def _names() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Stand-ins with the names that they are found under in files of any version."""
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (argparse.Namespace, "argparse.Namespace"),
        (_Dtype, "numpy.dtype"),
        (_Array, "numpy.ndarray"),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found += [(_number, f"{module}.scalar"), (_array, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):  # the latter is that of Python 3.13
        for kind in ("Path", "PosixPath", "PurePath", "PurePosixPath"):
            found.append((PurePosixPath, f"{module}.{kind}"))
        for kind in ("WindowsPath", "PureWindowsPath"):
            found.append((PureWindowsPath, f"{module}.{kind}"))
    return found


ALLOWED = _names()
"""Classes for ``torch.serialization.safe_globals``."""
