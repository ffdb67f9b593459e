"""Files with several planes: z-stacks, time series, pages, frames.

By default one plane of a file is read, and their number is logged once. With
``--data.slices all`` every plane is an image of its own. Planes are counted from the headers of
the files, by threads: some 1,000 TIFF files and 30,000 others in a second, on local disks.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ssl_vit.data.base import Item, Source
from ssl_vit.data.decode import BadImage, Decoded, array_planes, decode, npy_header
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.headers_of import headers_of
from ssl_vit.data.raster import chosen, reason, to_tensor, wanted

_log = logging.getLogger("ssl_vit")
_FIRST = 8
_FRAMES = ("GIF", "PNG", "WEBP", "AVIF")


class FileParts(Source):
    """Images that are parts of the files of ``whole``, one file after another.

    Attributes:
        firsts: int64 (files + 1,), the first image of each file, and the number of all.

    Args:
        counts: int64 (files,), the images of each.
        channels: that they are decoded to.
    """

    whole: Source
    file_of: np.ndarray

    def __init__(self, whole: Source, counts: np.ndarray, channels: int) -> None:
        self.channels = channels
        self.firsts = np.cumsum(np.concatenate([[0], counts])).astype(np.int64)
        file_of = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self.inherit(whole, file_of)
        self.whole, self.file_of = whole, file_of
        self.starts = None if whole.starts is None else self.firsts[whole.starts]

    def __len__(self) -> int:
        return len(self.file_of)

    def expect(self, images: Sequence[int] | np.ndarray) -> None:
        self.whole.expect(self.file_of[np.asarray(images, dtype=np.int64)])


class Planes(FileParts):
    """Planes source: every plane of the files of ``whole`` is an image of its own."""

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
                raise BadImage(reason(error)) from error
        return image, self.label(i)

    def name(self, i: int) -> str:
        file, plane, count = self._place(i)
        name = self.whole.name(file)
        return name if count == 1 else f"{name}[{plane}]"

    def listing(self) -> Iterable[np.ndarray]:
        """Listing of the files, and where their planes begin."""
        return (*self.whole.listing(), self.firsts)

    def _place(self, i: int) -> tuple[int, int, int]:
        """File of an image, its plane in it, and the number of planes there."""
        i = range(len(self))[i]
        file = int(self.file_of[i])
        start = int(self.firsts[file])
        return file, i - start, int(self.firsts[file + 1]) - start


def _read_plane(stream: io.IOBase, source: Planes, plane: int) -> Decoded:
    reading = replace(source.reading, slices=str(plane))
    kind = format_of(stream.read(HEAD))
    stream.seek(0)
    if kind == "TIFF":  # of which only that plane is read
        from ssl_vit.data.tiff import Plane, open_tiff

        with open_tiff(stream) as file:
            made = Plane.of(file, source.channels, reading).read()
            image = to_tensor(made, source.channels)
    elif kind == "DICOM":
        from ssl_vit.data.dicom import read_dicom

        own = wanted(source.channels, reading)
        image = to_tensor(chosen(read_dicom(stream, own, reading), reading), source.channels)
    else:
        image = decode(stream.read(), source.channels, reading)
    return image.numpy().view(Decoded)


def with_planes(source: Source, channels: int) -> Source:
    """The source as its ``reading`` asks for: every plane an image, or a word on what is read."""
    slices = source.reading.slices
    if not len(source) or slices.isdecimal() or is_array(source):
        return source
    if slices == "middle":
        log_planes(source, channels)
        return source
    found = _counted(source, range(len(source)), channels)
    counts = np.fromiter((file.planes for file in found), dtype=np.int64, count=len(source))
    if int(counts.max()) == 1:
        return source
    several = int((counts > 1).sum())
    text = "%s: %s images: each plane of %s files with several, and %s files with one"
    numbers = [f"{int(n):,}" for n in (counts.sum(), several, len(counts) - several)]
    _log.info(text, source.spec, *numbers)
    return Planes(source, counts, channels)


def is_array(source: Source) -> bool:
    """True if the images of a source are no files: they have no planes."""
    try:
        source.stream(0).close()  # of a large file not even the first one is read
        return False
    except BadImage:
        pass
    try:
        return isinstance(source.read(0)[0], np.ndarray)
    except BadImage:
        return False


def log_planes(source: Source, channels: int) -> None:
    """Log the plane that is read, where one of the first files has several."""
    first = range(min(_FIRST, len(source)))
    counted = list(_counted(source, first, channels))
    if found := [file for file in counted if file.planes > 1]:
        lowest, most = (f(file.planes for file in found) for f in (min, max))
        many = str(most) if lowest == most else f"{lowest} to {most}"
        axes = Counter(file.axes for file in found).most_common(1)[0][0]
        what, which = (f"planes ({axes})", "middle") if axes else ("frames", "first")
        also = "; --data.slices all makes each an image"
        unnamed = bool(set(axes) & set("IQ"))
        if unnamed and most != 3:  # three are a stack in any case
            also += f", --data.channels {most} makes them channels"
        _log.log(
            logging.WARNING if unnamed else logging.INFO,
            f"{source.spec}: {len(found)} of the first {len(first)} files have {many} {what}; "
            f"the {which} one is read{also}",
        )
    if parts := [file.set_of for file in counted if file.set_of > 1]:
        _log.warning(
            f"{source.spec}: {len(parts)} of the first {len(first)} files are each one of "
            f"{max(parts)} files of an OME-TIFF image; each is read as an image of its own"
        )


class Counted(NamedTuple):
    """Counts of a file: planes, letters of their axes (none: an animation), files of its set."""

    planes: int = 1
    axes: str = ""
    set_of: int = 1


def _counted(source: Source, files: range, channels: int) -> Iterator[Counted]:
    """Planes of each of these files."""
    channels = wanted(channels, source.reading)
    return headers_of(source, files, lambda stream: count_planes(stream, channels), Counted())


def count_planes(stream: Any, channels: int) -> Counted:
    """Planes of a file, by its headers."""
    kind = format_of(stream.read(HEAD))
    stream.seek(0)
    if kind == "TIFF":
        from ssl_vit.data.tiff import open_tiff
        from ssl_vit.data.tiff_planes import Stack

        with open_tiff(stream) as file:
            stack = Stack.of(file, channels)
            return Counted(len(stack.planes), stack.names, stack.set_of)
    if kind == "NPY":
        shape = npy_header(stream)[0]
        return Counted(array_planes(shape, channels), "x".join(map(str, shape)))
    if kind == "DICOM":
        from ssl_vit.data.dicom import count_frames

        return Counted(count_frames(stream), "frames")
    if kind in _FRAMES:
        from PIL import Image

        with Image.open(stream, formats=(kind,)) as image:
            return Counted(getattr(image, "n_frames", 1))
    return Counted()
