"""Member of a tar file as a stream: read where it lies, without the rest of it."""

import io
import os
from typing import Any


class Member(io.RawIOBase):
    """Bytes ``start`` to ``start + size`` of an open file; the file's position is not moved.

    ``file``: it has a ``descriptor``, which is open for as long as it is referred to.
    """

    def __init__(self, file: Any, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        self.at = max(0, base + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self.at)]
        count = os.preadv(self.file.descriptor, [view], self.start + self.at) if len(view) else 0
        self.at += count
        return count
