"""Tar source: WebDataset shards, read at random through an index of member offsets."""

import io
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Item, Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.member import Member
from ssl_vit.data.names import Names
from ssl_vit.data.shard_names import find_shards
from ssl_vit.data.tar_index import ShardIndex, load_index
from ssl_vit.data.tar_labels import read_labels
from ssl_vit.data.tar_names import split_name
from ssl_vit.data.tar_samples import Rows, choose_samples

log = logging.getLogger("ssl_vit")
Tar = TypeVar("Tar", bound="TarSource")
_MAX_OPEN = 64  # open shards per process, far below the usual limit of 1024 files


class TarSource(Source):
    """Tar source: the samples of several shards, concatenated.

    Attributes:
        shards: the paths of the shards.
        full: a sample's name is its member's up to the last dot, not the first.
    """

    def __init__(
        self, spec: str, shards: list[str], indexes: list[ShardIndex], rows: Rows, full: bool
    ):
        self.spec, self.shards, self.full = spec, tuple(shards), full
        both = list(zip(indexes, rows, strict=True))
        self.starts: np.ndarray = np.cumsum([0] + [len(own) for own in rows], dtype=np.int64)
        self.offsets = np.concatenate([index.offsets[own] for index, own in both])
        self.sizes = np.concatenate([index.sizes[own] for index, own in both])
        self.names = Names.joined([index.names.take(own) for index, own in both])
        self._files: OrderedDict[int, OpenFile] = OrderedDict()

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

    def stream(self, i: int) -> io.IOBase:
        i = range(len(self))[i]
        shard = self._shard(i)
        try:
            file = self._open(shard)
        except OSError as error:
            reason = f"cannot be read from {self.shards[shard]}: {error.strerror or error}"
            raise BadImage(reason) from error
        return io.BufferedReader(Member(file, int(self.offsets[i]), int(self.sizes[i])))

    def name(self, i: int) -> str:
        i = range(len(self))[i]
        key = split_name(os.fsdecode(self.names[i]), self.full)[0]
        return f"{self.shards[self._shard(i)]}:{key}"

    def inner_name(self, i: int) -> str:
        shard = self.shards[self._shard(range(len(self))[i])]
        return os.path.basename(shard) + self.name(i)[len(shard) :]

    def listing(self) -> Iterable[np.ndarray]:
        """Keys and sizes of the samples."""
        return self.names.buffer, self.names.ends, self.sizes

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def _open(self, shard: int) -> "OpenFile":
        """Open file of a shard; the least recently used one is closed when there are too many."""
        file = self._files.pop(shard, None) or self._opened(shard)
        self._files[shard] = file
        while len(self._files) > _MAX_OPEN:
            self._files.popitem(last=False)
        return file

    def _opened(self, shard: int) -> "OpenFile":
        return OpenFile(self.shards[shard])

    def __getstate__(self) -> dict[str, object]:
        # Descriptors are invalid in another process. A forked one shares them, which is safe: pread
        # does not move the position.
        return {**self.__dict__, "_files": OrderedDict()}


class OpenFile:
    """Open file: a descriptor, closed with its last reference, so never during a read."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def exists(self) -> bool:
        """True if the file still has a name, and was not removed."""
        return os.fstat(self.descriptor).st_nlink > 0

    def __del__(self) -> None:
        if hasattr(self, "descriptor") and os is not None:  # None at interpreter exit
            os.close(self.descriptor)


def open_tar(spec: str, pattern: str, reading: ReadConfig | None = None) -> TarSource:
    """Open the shards of a pattern: `{000000..000146}` ranges, wildcards, or one file.

    Raises:
        UserError: a shard is missing, compressed or damaged, or there are no images.
    """
    reading = reading or ReadConfig()
    shards = find_shards(spec, pattern)
    indexes = [load_index(Path(shard), reading.label_column) for shard in shards]
    return samples_of(spec, shards, indexes, reading, TarSource)


def samples_of(
    spec: str,
    shards: list[str],
    indexes: list[ShardIndex],
    reading: ReadConfig,
    kind: type[Tar],
) -> Tar:
    """The source of the samples of these shards, with their labels; what is left out is reported.

    Raises:
        UserError: there are no images, or not the labels that were asked for.
    """
    if not any(len(index.sizes) for index in indexes):
        there = _by_extension(indexes)
        raise UserError(f"{spec!r} holds no image in {len(shards)} shard(s)" + there)
    rows, full = choose_samples(spec, indexes, reading)
    source = kind(spec, shards, indexes, rows, full)
    found = read_labels(spec, shards, indexes, rows, reading.label_column)
    source.labels, source.targets, source.classes, source.labels_from = found[:4]
    passed = _by_extension(indexes, without=found.member)
    if passed:
        log.info("%s: members passed over as no images%s", spec, passed)
    return source


def _by_extension(indexes: Sequence[ShardIndex], without: str = "") -> str:
    """Members that are no images by extension: `: 240 .txt, 3 .md`; empty if there are none."""
    count = sum((Counter(index.passed) for index in indexes), Counter())
    if without:
        del count[without]
    kinds = [
        f"{n:,} .{kind}" if kind else f"{n:,} without extension" for kind, n in count.most_common(8)
    ]
    return f": {', '.join(kinds)}" if kinds else ""
