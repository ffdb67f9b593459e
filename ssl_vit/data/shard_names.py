"""Shard patterns: `{000000..000146}` ranges, `{a,b}` lists, wildcards; and what is no pattern."""

from __future__ import annotations

import os
import re
from glob import glob
from itertools import product

from ssl_vit.common.errors import UserError
from ssl_vit.data.tar_index import INDEX_SUFFIX

_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")


def find_shards(spec: str, pattern: str) -> list[str]:
    """Return the absolute paths of the shards, in the order of the ranges, wildcards sorted.

    Raises:
        UserError: a shard is missing, or the pattern is not understood.
    """
    shards: list[str] = []
    missing: list[str] = []
    whole = os.path.abspath(os.path.expanduser(pattern))
    for path in [whole] if os.path.isfile(whole) else expand(spec, whole):
        found = [path] if os.path.isfile(path) else sorted(glob(path, recursive=True))
        found = [name for name in found if os.path.isfile(name) and INDEX_SUFFIX not in name]
        shards += found
        missing += [] if found else [path]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        if os.path.isdir(missing[0]):
            more = f", a folder; for all shards in it give 'tar:{missing[0]}/*.tar'"
        raise UserError(f"{spec!r}: there is no shard {missing[0]}{more}")
    return list(dict.fromkeys(shards))


def expand(spec: str, pattern: str) -> list[str]:
    """Expand braces as a shell does: ranges of numbers, with as many digits as the first has, and
    lists; each item of a list may be a range.

    Raises:
        UserError: a range is empty or of letters, or braces are within braces.
    """
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    texts, insides = pieces[0::2], pieces[1::2]
    if any(re.search(r"[{}]", text) for text in texts) and insides:
        raise UserError(f"{spec!r}: braces within braces are not understood; list the shards")
    choices = [[one for item in i.split(",") for one in _items(spec, item)] for i in insides]
    return [
        texts[0] + "".join(a + b for a, b in zip(chosen, texts[1:], strict=True))
        for chosen in product(*choices)
    ]


def _items(spec: str, item: str) -> list[str]:
    """Names that one item of a list stands for: the numbers of a range, or itself."""
    found = _RANGE.fullmatch(item)
    if found is None:
        if ".." in item:
            raise UserError(f"{spec!r}: {item} is no range of numbers; list its parts: {{a,b}}")
        return [item]
    first, last, step = found.groups()
    numbers = range(int(first), int(last) + 1, max(1, int(step or 1)))
    if not numbers:
        raise UserError(f"{spec!r}: the range {{{first}..{last}}} is empty")
    return [f"{number:0{len(first)}}" for number in numbers]
