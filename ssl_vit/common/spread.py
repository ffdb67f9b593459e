"""Patterns without quotes: the shell replaced them by the paths that they stand for."""

import os
from collections.abc import Sequence
from itertools import pairwise

from ssl_vit.common.errors import UserError

_SHOWN = 8


def refuse_spread(flags: Sequence[str], unknown: Sequence[str] = ()) -> None:
    """Refuse arguments that are a pattern spread by the shell.

    Either ``--name p1 p2 p3``, of which the parser leaves p2 and p3 as ``unknown``; or, one after
    the other, ``--name=p1 --name=p2 --name=p3``, of which it would take the last.

    Raises:
        UserError: they are; the line gives the pattern in quotes.
    """
    for before, after in pairwise(flags):
        option, equal, value = before.partition("=")
        if equal and _is_path(value) and after.startswith(f"{option}=") and after != before:
            start = f"{option}="
            _refuse(option, [f.removeprefix(start) for f in flags if f.startswith(start)])
    if unknown and not unknown[0].startswith("-"):
        at = list(flags).index(unknown[0])
        options = [i for i in range(at) if flags[i].startswith("--")]
        if options:
            ends = [i for i in range(at, len(flags)) if flags[i].startswith("--")]
            values = list(flags[options[-1] + 1 : min(ends, default=len(flags))])
            if len(values) > 1 and all(map(_is_path, values)):
                _refuse(flags[options[-1]], values)


def _is_path(text: str) -> bool:
    return any(mark in text for mark in ":/.")


def _refuse(option: str, values: Sequence[str]) -> None:
    if values[0].startswith(("folder:", "flat:")):
        raise UserError(f"{option} has {len(values)} folders; give one, the one above them")
    raise UserError(
        f"{option} has {len(values)} values, as the shell spreads a pattern without quotes: quote "
        f"it: {option} '{pattern_of(values)}'"
    )


def pattern_of(paths: Sequence[str]) -> str:
    """A pattern that stands for these paths, which differ in one place: a range of numbers in
    braces, a short list, or a wildcard."""
    start = os.path.commonprefix(list(paths))  # noqa: RUF071  # by characters, as is wanted
    ends = [path[len(start) :][::-1] for path in paths]
    end = os.path.commonprefix(ends)[::-1]  # noqa: RUF071
    # A range is of whole numbers: digits that all have in common belong to them.
    start, end = start.rstrip("0123456789"), end.lstrip("0123456789")
    middles = [path[len(start) : len(path) - len(end)] for path in paths]
    if all(middle.isdecimal() for middle in middles):
        numbers = [int(middle) for middle in middles]
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{start}{{{middles[0]}..{middles[-1]}}}{end}"
    return f"{start}{{{','.join(middles)}}}{end}" if len(paths) <= _SHOWN else f"{start}*{end}"
