"""Standard streams whose reader may go: a run outlives the terminal that it was started in."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# A terminal that was closed, and a pipe that nobody reads any more.
_GONE = (errno.EIO, errno.EPIPE, errno.ENXIO)


class _Outlived:
    """Text stream that writes to the null device from when its reader has gone."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text; its length."""
        try:
            self.stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        try:
            self.stream.flush()
        except OSError as error:
            self._drop(error)
            self.stream.flush()  # what it still holds would make Python's exit fail

    def _drop(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Context manager in which printing does not fail where nobody can read it any more."""
    before = sys.stdout, sys.stderr
    ours = _Outlived(before[0]), _Outlived(before[1])
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        for stream in ours:
            with suppress(OSError):  # not to hide what ends the run
                stream.flush()
        sys.stdout, sys.stderr = before
