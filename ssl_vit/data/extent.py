"""Extent of images: height, width and planes of a file, by its headers."""

import math
import os
from dataclasses import dataclass
from typing import Any

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.decode import npy_header
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.headers import coded_size
from ssl_vit.data.raster import MAX_PIXELS, BadImage, wanted
from ssl_vit.data.slices import count_planes
from ssl_vit.data.windows import array_size

_HEADER = 1 << 16  # in which most images say how large they are


@dataclass(frozen=True)
class Extent:
    """Height and width of the image in a file (0: not known), and the number of its planes.

    ``part``: height and width of the strips or tiles of which it decodes whole ones, (0, 0) where
    any part is read alone. ``full``: height at level 0.
    """

    height: int = 0
    width: int = 0
    planes: int = 1
    part: tuple[int, int] = (0, 0)
    full: int = 0


def extent_of(stream: Any, channels: int, reading: ReadConfig) -> Extent:
    """Extent of the file that a stream reads.

    Raises:
        BadImage: it is no image, or has not the level, bands or channels that are asked for.
        Exception: of any kind, by a library that reads headers.
    """
    kind = format_of(stream.read(HEAD))
    stream.seek(0)
    own = wanted(channels, reading)
    if kind == "TIFF":
        return _of_tiff(stream, own, reading)
    if reading.level:
        raise BadImage(f"has no levels; --data.level is {reading.level}")
    if kind == "NPY":
        shape, _, dtype = npy_header(stream)
        height, width = array_size(shape, own)
        start = stream.tell()
        if start + math.prod(shape) * dtype.itemsize > stream.seek(0, os.SEEK_END):
            return Extent()  # truncated
    else:
        height, width = _size(stream, kind)
        if height * width > MAX_PIXELS:  # decoded as a whole, which is refused
            return Extent()
    if not height * width:
        return Extent()
    stream.seek(0)
    planes = count_planes(stream, own).planes if reading.slices == "all" else 1
    return Extent(height, width, planes)


def _of_tiff(stream: Any, channels: int, reading: ReadConfig) -> Extent:
    from ssl_vit.data.tiff import check_layout, open_tiff
    from ssl_vit.data.tiff_planes import Stack
    from ssl_vit.data.tiff_window import by_row, part_size

    with open_tiff(stream) as file:
        stack = Stack.of(file, channels, reading.level)
        page = stack.series.keyframe
        check_layout(page, file.filehandle)
        rows = by_row(page)
        part = (0, 0) if rows or not stack.by_window else part_size(page)
        # Damaged, or decoded as a whole, which is refused.
        cut = rows and page.dataoffsets[0] + page.nbytes > file.filehandle.size
        whole = math.prod(part if stack.by_window else (stack.height, stack.width))
        if cut or whole > MAX_PIXELS:
            return Extent()
        planes = len(stack.planes) if reading.slices == "all" else 1
        return Extent(stack.height, stack.width, planes, part, stack.base.keyframe.imagelength)


def _size(stream: Any, kind: str) -> tuple[int, int]:
    """Height and width of an image that is neither TIFF nor array."""
    if kind == "DICOM":
        from ssl_vit.data.dicom import frame_size

        return frame_size(stream)
    if kind == "HEIF":
        import pillow_heif

        width, height = pillow_heif.open_heif(stream).size
        return height, width
    if found := coded_size(stream.read(_HEADER)):
        return found
    from PIL import Image

    stream.seek(0)
    with Image.open(stream) as image:
        return image.height, image.width
