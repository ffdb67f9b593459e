"""Names of many images in two arrays, as lists of Python strings would be large."""

from array import array
from collections.abc import Iterable

import numpy as np


class Names:
    """Name list: byte strings in one uint8 buffer, with int64 end offsets."""

    def __init__(self, buffer: np.ndarray, ends: np.ndarray):
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Names":
        """Pack names, given as any iterable."""
        buffer = bytearray()
        ends = array("q")  # not a list: a Python integer per name takes four times the memory
        for name in names:
            buffer += name
            ends.append(len(buffer))
        return cls(np.frombuffer(buffer, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    @classmethod
    def joined(cls, parts: list["Names"]) -> "Names":
        """Concatenate lists."""
        starts = np.cumsum([0] + [len(part.buffer) for part in parts])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.buffer for part in parts]), np.concatenate(ends))

    def take(self, rows: np.ndarray) -> "Names":
        """Names at these indices, in this order."""
        same = len(rows) == len(self) and bool((rows == np.arange(len(self))).all())
        return self if same else Names.of(self[int(i)] for i in rows)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        i = range(len(self))[i]  # counts negative ones from the end, raises IndexError
        start = int(self.ends[i - 1]) if i else 0
        return self.buffer[start : int(self.ends[i])].tobytes()
