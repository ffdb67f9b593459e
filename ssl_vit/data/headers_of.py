"""Headers of all files of a source, read by threads."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ssl_vit.data.base import Source

T = TypeVar("T")
_THREADS = 16
_AT_ONCE = 4096  # files that are waited for at a time


def headers_of(
    source: Source, files: range, read: Callable[[io.IOBase], T], otherwise: T
) -> Iterator[T]:
    """Results of ``read`` on the stream of each of these files, in their order; ``otherwise`` for
    one that cannot be read: it is one image, and reading it says why."""

    def found(i: int) -> T:
        try:
            with source.stream(i) as stream:
                return read(stream)
        except Exception:  # decoders raise all kinds
            return otherwise

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(files), _AT_ONCE):
            yield from pool.map(found, files[start : start + _AT_ONCE])
