"""Files with several planes: z-stacks, time series, pages, frames of an animation.

By default one plane of a file is read, and it is said once how many there are. With
``--data.slices all`` every plane is an image of its own. Planes are counted from the headers of
the files, by threads: some 1,000 TIFF files and 30,000 others in a second, on local disks.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from ssl_vit.data.base import Item, Source
from ssl_vit.data.decode import BadImage, Decoded, array_planes, decode
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.raster import to_tensor

_log = logging.getLogger("ssl_vit")
_FIRST = 8
_THREADS = 16
_AT_ONCE = 4096  # files whose counts are waited for at a time
_FRAMES = {"GIF": "GIF", "PNG": "PNG", "WEBP": "WEBP", "AVIF": "AVIF"}


class Planes(Source):
    """Planes source: every plane of the files of ``whole`` is an image of its own.

    ``counts``: int64 (files,), the planes of each.
    """

    def __init__(self, whole: Source, counts: np.ndarray, channels: int) -> None:
        self.whole: Source = whole
        self.channels = channels
        self.starts = np.cumsum(np.concatenate([[0], counts])).astype(np.int64)
        self.file_of: np.ndarray = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self.spec, self.classes, self.reading = whole.spec, whole.classes, whole.reading
        self.labels_from = whole.labels_from
        self.labels = None if whole.labels is None else whole.labels[self.file_of]
        self.targets = None if whole.targets is None else whole.targets[self.file_of]

    def __len__(self) -> int:
        return len(self.file_of)

    def read(self, i: int) -> Item:
        file, plane, count = self._place(i)
        if count == 1:
            return self.whole.read(file)
        with self.whole.stream(file) as stream:
            try:
                image = _read_plane(stream, self, plane)
            except BadImage:
                raise
            except Exception as error:  # decoders raise all kinds
                raise BadImage(f"{type(error).__name__}: {error}") from error
        return image, self.label(i)

    def name(self, i: int) -> str:
        file, plane, count = self._place(i)
        name = self.whole.name(file)
        return name if count == 1 else f"{name}[{plane}]"

    def _place(self, i: int) -> tuple[int, int, int]:
        """File of an image, its plane in it, and the number of planes there."""
        i = range(len(self))[i]
        file = int(self.file_of[i])
        start = int(self.starts[file])
        return file, i - start, int(self.starts[file + 1]) - start


def _read_plane(stream: io.IOBase, source: Planes, plane: int) -> Decoded:
    reading = replace(source.reading, slices=str(plane))
    if format_of(stream.read(HEAD)) == "TIFF":  # of which only that plane is read
        from ssl_vit.data.tiff import open_tiff, read_plane

        with open_tiff(stream) as file:
            image = to_tensor(read_plane(file, source.channels, reading), source.channels)
    else:
        stream.seek(0)
        image = decode(stream.read(), source.channels, reading)
    return image.numpy().view(Decoded)


def with_planes(source: Source, channels: int) -> Source:
    """The source as its ``reading`` asks for: every plane an image, or a word on what is read."""
    slices = source.reading.slices
    if not len(source) or slices.isdecimal() or _is_array(source):
        return source
    if slices == "middle":
        _tell(source, channels)
        return source
    counts = np.array([n for n, _ in _counted(source, range(len(source)), channels)], np.int64)
    if int(counts.max()) == 1:
        return source
    found, several = int(counts.sum()), int((counts > 1).sum())
    text = "%s: %s images: each plane of %s files with several, and %s files with one"
    rest = len(counts) - several
    _log.info(text, source.spec, f"{found:,}", f"{several:,}", f"{rest:,}")
    return Planes(source, counts, channels)


def _is_array(source: Source) -> bool:
    """Whether the images of a source are no files: they have no planes."""
    try:
        return isinstance(source.read(0)[0], np.ndarray)
    except BadImage:
        return False


def _tell(source: Source, channels: int) -> None:
    """Say which plane is read, where one of the first files has several."""
    first = range(min(_FIRST, len(source)))
    found = [(n, axes) for n, axes in _counted(source, first, channels) if n > 1]
    if not found:
        return
    counts = sorted({n for n, _ in found})
    axes = Counter(axes for _, axes in found).most_common(1)[0][0]
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    what, which = (f"planes ({axes})", "middle") if axes else ("frames", "first")
    text = "%s: %d of the first %d files have %s %s; the %s one is read (--data.slices all: each)"
    _log.info(text, source.spec, len(found), len(first), many, what, which)


def _counted(source: Source, files: range, channels: int) -> Iterator[tuple[int, str]]:
    """Number of planes and names of the axes, of each file."""

    def count(i: int) -> tuple[int, str]:
        try:
            with source.stream(i) as stream:
                return count_planes(stream, channels)
        except Exception:  # a bad image is one image: reading it says why
            return 1, ""

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(files), _AT_ONCE):
            yield from pool.map(count, files[start : start + _AT_ONCE])


def count_planes(stream: Any, channels: int) -> tuple[int, str]:
    """Number of planes of a file, and the names of its axes; empty for frames of an animation."""
    kind = format_of(stream.read(HEAD))
    stream.seek(0)
    if kind == "TIFF":
        from ssl_vit.data.tiff import open_tiff
        from ssl_vit.data.tiff_planes import Stack

        with open_tiff(stream) as file:
            stack = Stack.of(file, channels)
            return len(stack.planes), stack.names
    if kind == "NPY":
        shape = _npy_shape(stream)
        return array_planes(shape, channels), "x".join(map(str, shape))
    if kind in _FRAMES:
        from PIL import Image

        with Image.open(stream, formats=(_FRAMES[kind],)) as image:
            return getattr(image, "n_frames", 1), ""
    return 1, ""


def _npy_shape(stream: Any) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)[0]
