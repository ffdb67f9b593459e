"""Image cache: decoded images on a disk or in memory, stored when first used, then read from there.

Each is a file, named by a hash of its encoded bytes and of how they are decoded. So changed images
are other ones; and any number of runs, processes and machines fill and read one folder, without a
lock and without knowing of each other: a file is written under a name of its own, then renamed, and
thus complete or absent, also where its writer is killed. (A database of one file, as LMDB, has one
writer at a time and a size set beforehand, and must not be on a network disk.)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.free_memory import free_memory_here
from ssl_vit.common.reading import DataConfig
from ssl_vit.data import passing_folder
from ssl_vit.data.base import Source
from ssl_vit.data.decode import BadImage, Decoded
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.raster import EmptyTile
from ssl_vit.data.shared_memory import SHARED_MEMORY

Raw = bytes | bytearray | np.ndarray

_FOLDER, _PARTIAL = "decoded-images", "partial"
# Mark, kind of number, order in memory (1: pixel by pixel), channels, height, width; 32 bytes.
_HEAD = struct.Struct("<4sBBxxIII12x")
_MARK, _NUMBERS = b"SVI1", (np.dtype(np.uint8), np.dtype("<f4"))
_PARTS = "parts of files (--data.slices all, --data.tile, --data.level) are not kept"
_ABANDONED = 3600  # seconds; an image is written in one, at most
_GB = 1e9
RAM = "ram"
"""The value of ``--data.cache`` for memory; a folder of that name is ``./ram``."""


@dataclass
class ImageCache:
    """Cache in a folder; ``reserve``: bytes that stay free on its disk.

    ``stores``: whether images are added to it. ``stopped``: why no more are, as a line for people.
    """

    path: str
    reserve: float
    stores: bool = True
    stopped: str = ""
    place: ClassVar[str] = "there"

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of the images, within the one that the user gave."""
        return Path(self.path).expanduser() / _FOLDER

    def image(self, raw: Raw, how: str, decode: Callable[[], Tensor | None]) -> Tensor | None:
        """The image (C, H, W) that ``decode`` makes of ``raw``, from the cache if it is there: the
        same values in the same order in memory. It may be written to.

        ``how``: all that ``decode`` depends on beside ``raw``. Arrays, also those of NPY files, are
        not kept: they need no decoding.

        Raises:
            BadImage: raised by ``decode``.
        """
        if isinstance(raw, np.ndarray) or _is_npy(raw):
            return decode()
        digest = hashlib.sha256(raw)
        digest.update(how.encode())
        name = digest.hexdigest()
        file = f"{self.folder}/{name[:2]}/{name[2:]}"
        found = _load(file)
        if found is None:
            found = decode()
            if found is not None and self.stores and not self.stopped:
                self._store(Path(file), found)
        return found

    def _store(self, file: Path, image: Tensor) -> None:
        """Store an image; where that fails, or too little room is left, none is from now on."""
        by_pixel = not image.is_contiguous()
        pixels = (image.permute(1, 2, 0) if by_pixel else image).contiguous().numpy()
        head = _HEAD.pack(_MARK, _NUMBERS.index(pixels.dtype), by_pixel, *image.shape)
        partial = self.folder / _PARTIAL / uuid.uuid4().hex
        try:
            free = self.free()
            if free - len(head) - pixels.nbytes < self.reserve:
                keep = f"{_size(self.reserve)} stay so: --data.cache-reserve, or room for batches"
                self._stop(f"{_size(free)} are free {self.place}, and {keep}")
                return
            try:
                with partial.open("xb") as stream:
                    stream.write(head)
                    stream.write(pixels.data)
                file.parent.mkdir(exist_ok=True)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            self._stop(error.strerror or str(error))

    def _stop(self, reason: str) -> None:
        rest = "images that are not in it are decoded each time"
        self.stopped = f"--data.cache {self.path} takes no more images ({reason}): {rest}"

    def free(self) -> float:
        """Bytes that are free where it is."""
        return float(shutil.disk_usage(_existing(self.folder)).free)

    def spare(self, count: float) -> None:
        """Leave so many bytes of shared memory free, where it takes some: batches need them."""
        with contextlib.suppress(OSError):
            if os.stat(SHARED_MEMORY).st_dev == os.stat(self.folder).st_dev:
                self.reserve = max(self.reserve, count)

    def prepare(self) -> None:
        """Make its folders, if it stores, and remove what killed processes left half written.

        Raises:
            UserError: they cannot be made.
        """
        if not self.stores:
            return
        partial = self.folder / _PARTIAL
        try:
            partial.mkdir(parents=True, exist_ok=True)
            for file in partial.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    if file.stat().st_mtime < time.time() - _ABANDONED:
                        file.unlink()
        except OSError as error:
            raise _refused(self.path, error.strerror or str(error)) from None

    def release(self) -> None:
        """Release what :meth:`prepare` has taken."""

    def read_only(self) -> ImageCache:
        """The same cache for who only reads from it."""
        return replace(self, stores=False)

    def about(self, images: int, size: float) -> str:
        """The cache in a line; ``size``: bytes of one of so many ``images``, on average."""
        free, need = self.free(), images * size
        share = max(0.0, free - self.reserve) / max(need, 1.0)
        said = f"{self.path}: {images:,} decoded images take about {_size(need)}; "
        said += f"{_size(free)} are free {self.place}, {_size(self.reserve)} stay so"
        return said if share >= 1 else f"{said}: room for {100 * share:.0f} % of them"


class RamCache(ImageCache):
    """Cache in memory that all processes of a user on this machine share; the last one to end, or
    to :meth:`release` it, removes it."""

    place: ClassVar[str] = "in memory"

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of the images, in a file system without a disk."""
        return _ram_folder() / _FOLDER

    def free(self) -> float:
        """Bytes of memory that are free."""
        return min(super().free(), free_memory_here())

    def prepare(self) -> None:
        """Prepare the cache as one on a disk; from now on this process uses it."""
        if self.stores:
            try:
                passing_folder.join(_ram_folder())
            except OSError as error:
                raise _refused(self.path, error.strerror or str(error)) from None
        super().prepare()

    def release(self) -> None:
        """Release the cache: this process uses it no longer."""
        if self.stores:
            passing_folder.leave(_ram_folder())


def _ram_folder() -> Path:
    """The folder in memory of this user."""
    return Path(SHARED_MEMORY) / f"ssl_vit-{os.getuid()}"


def _open_ram(reserve: float) -> RamCache:
    """A cache in memory, of which half of what is free stays so, if that is less than ``reserve``;
    what killed processes have left of one is removed.

    Raises:
        UserError: this system has no file system in memory.
    """
    there = Path(SHARED_MEMORY).is_dir()
    check(there, f"--data.cache is {RAM!r}; this system has no {SHARED_MEMORY}: give a folder")
    passing_folder.remove_abandoned(_ram_folder())
    return RamCache(RAM, min(reserve, RamCache(RAM, 0.0).free() / 2))


def open_cache(data: DataConfig) -> ImageCache | None:
    """The cache of ``--data.cache``, if one is asked for; nothing is written yet.

    Raises:
        UserError: there can be no folder there that is written to.
    """
    if not data.cache:
        return None
    reserve = data.cache_reserve * _GB
    if data.cache == RAM:
        return _open_ram(reserve)
    cache = ImageCache(data.cache, reserve)
    there = _existing(cache.folder)
    if not there.is_dir():
        raise _refused(data.cache, f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _refused(data.cache, f"{there} cannot be written to")
    return cache


def no_use(source: Source) -> str:
    """Reason why a cache is of no use for a source, by its first image, and in a mix by its last
    one, which is of another source; empty if it may be."""
    first = _no_use(source, 0)
    return first if source.mix is None else first and _no_use(source, len(source) - 1)


def _no_use(source: Source, i: int) -> str:
    try:
        raw = source.read(i)[0]
    except EmptyTile:
        return _PARTS
    except BadImage:
        return ""
    if isinstance(raw, Decoded):
        return _PARTS
    if isinstance(raw, np.ndarray) or _is_npy(raw):
        return f"the images of {source.spec} are arrays, which need no decoding"
    return ""


def _is_npy(raw: bytes | bytearray) -> bool:
    return format_of(bytes(raw[:HEAD])) == "NPY"


def _load(file: str) -> Tensor | None:
    """The image in a file; None where it is not there, or not whole, as after a power failure."""
    try:
        data = _read(file)
    except OSError:
        return None
    if len(data) < _HEAD.size:
        return None
    mark, number, by_pixel, channels, height, width = _HEAD.unpack(data[: _HEAD.size].tobytes())
    if mark != _MARK or number >= len(_NUMBERS):
        return None
    kind = _NUMBERS[number]
    if len(data) - _HEAD.size != channels * height * width * kind.itemsize:
        return None
    values = torch.from_numpy(data[_HEAD.size :].view(kind))
    if by_pixel:
        return values.view(height, width, channels).permute(2, 0, 1)
    return values.view(channels, height, width)


def _read(file: str) -> np.ndarray:
    """The bytes of a file; half the time of ``numpy.fromfile`` where they are few."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = np.empty(os.fstat(descriptor).st_size, dtype=np.uint8)
        return data[: os.readv(descriptor, [data.data])]
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))


def _refused(path: str, reason: str) -> UserError:
    advice = "give a folder on a fast disk of this machine"
    return UserError(f"--data.cache is {path!r}: {reason}; {advice}")


def _size(count: float) -> str:
    """Bytes for people, in the units of ``--data.cache-reserve``."""
    if count < _GB:
        return f"{count / 1e6:.3g} MB"
    return f"{count / _GB:.1f} GB" if count < 10 * _GB else f"{count / _GB:,.0f} GB"
