"""Blocks of rows: long rows, of all prototypes, are gone through while they are in the cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Numbers of a block on a CPU: 2 MB of float32.
_NUMBERS = 1 << 19


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows (n, k) of a tensor, in order: on a CPU of at most 2 MB, else all at once.

    An operation on each is the same as one on all, but its temporary results stay small and near.
    """
    n, k = rows.shape
    size = max(1, _NUMBERS // max(1, k)) if rows.device.type == "cpu" else max(1, n)
    return (slice(start, start + size) for start in range(0, n, size))
