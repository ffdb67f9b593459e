"""Tar source: WebDataset shards, read at random through an index of member offsets."""

import os
import re
from collections import OrderedDict
from glob import glob
from itertools import product
from pathlib import Path

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.data.base import Item, Names, Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.tar_index import INDEX_SUFFIX, ShardIndex, load_index

_MAX_OPEN = 64  # open shards per process, far below the usual limit of 1024 files
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarSource(Source):
    """Tar source: the samples of several shards, concatenated.

    Attributes:
        shards: the paths of the shards.
        starts: int64 (shards + 1,); shard s has the samples from starts[s] to before starts[s+1].
    """

    def __init__(self, spec: str, shards: list[str], indexes: list[ShardIndex]):
        self.spec, self.shards = spec, tuple(shards)
        self.starts = np.cumsum([0] + [len(index.offsets) for index in indexes], dtype=np.int64)
        self.offsets = np.concatenate([index.offsets for index in indexes])
        self.sizes = np.concatenate([index.sizes for index in indexes])
        self.keys = Names.joined([index.keys for index in indexes])
        labels = np.concatenate([index.labels for index in indexes])
        if len(labels) and labels.min() >= 0:  # -1 marks a sample without a label
            self.labels = labels
            self.classes = tuple(str(label) for label in range(int(labels.max()) + 1))
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, i: int) -> Item:
        i = range(len(self))[i]
        shard, data = self._shard(i), bytearray(int(self.sizes[i]))
        try:
            read = os.preadv(self._open(shard).descriptor, [data], int(self.offsets[i]))
        except OSError as error:
            reason = f"cannot be read from {self.shards[shard]}: {error.strerror or error}"
            raise BadImage(reason) from error
        if read < len(data):
            raise BadImage(f"{self.shards[shard]} ends before it: the shard was truncated")
        return data, self.label(i)

    def name(self, i: int) -> str:
        i = range(len(self))[i]
        return f"{self.shards[self._shard(i)]}:{os.fsdecode(self.keys[i])}"

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def _open(self, shard: int) -> "_OpenFile":
        """Open file of a shard; the least recently used one is closed when there are too many."""
        file = self._files.pop(shard, None) or _OpenFile(self.shards[shard])
        self._files[shard] = file
        while len(self._files) > _MAX_OPEN:
            self._files.popitem(last=False)
        return file

    def __getstate__(self) -> dict[str, object]:
        # Descriptors are invalid in another process. A forked one shares them, which is safe: pread
        # does not move the position.
        return {**self.__dict__, "_files": OrderedDict()}


class _OpenFile:
    """Open file: a descriptor, closed with its last reference, so never during a read."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor") and os is not None:  # None at interpreter exit
            os.close(self.descriptor)


def open_tar(spec: str, pattern: str) -> TarSource:
    """Open the shards of a pattern: `{000000..000146}` ranges, wildcards, or one file.

    Raises:
        UserError: a shard is missing, compressed or damaged, or there are no images.
    """
    shards = find_shards(spec, pattern)
    source = TarSource(spec, shards, [load_index(Path(shard)) for shard in shards])
    if not len(source):
        raise UserError(f"{spec!r} holds no image in {len(shards)} shard(s)")
    return source


def find_shards(spec: str, pattern: str) -> list[str]:
    """Return the absolute paths of the shards, in the order of the ranges, wildcards sorted."""
    shards: list[str] = []
    missing: list[str] = []
    for path in _expand(spec, os.path.abspath(os.path.expanduser(pattern))):
        found = [path] if os.path.isfile(path) else sorted(glob(path))
        found = [name for name in found if os.path.isfile(name) and INDEX_SUFFIX not in name]
        shards += found
        missing += [] if found else [path]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{spec!r}: there is no {missing[0]}{more}")
    return list(dict.fromkeys(shards))


def _expand(spec: str, pattern: str) -> list[str]:
    """Expand each `{first..last}`, with as many digits as `first` has."""
    pieces = _RANGE.split(pattern)  # text, first, last, text, first, last, ..., text
    ranges: list[list[str]] = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise UserError(f"{spec!r}: the range {{{first}..{last}}} is empty")
        ranges.append([f"{number:0{len(first)}}" for number in numbers])
    texts = pieces[0::3]
    return [
        texts[0] + "".join(a + b for a, b in zip(numbers, texts[1:], strict=True))
        for numbers in product(*ranges)
    ]
