"""Windows of a TIFF page: of its strips or tiles only those that a window touches are decoded.

What is stored row by row, as it is, is read by the row. All else is decoded by tifffile, strip by
strip or tile by tile (``TiffPage.decode``), as it does for whole pages.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_vit.data.headers import coded_size, jpeg2000_header
from ssl_vit.data.raster import BadImage, Box, check_pixels
from ssl_vit.data.recent import Recent

_SEPARATE = 2  # planar configuration
JPEG = (6, 7, 33007, 34892)
# Codecs that allocate what the header of their own data asks for, not what the TIFF says.
OWN_SIZE = (*JPEG, 22610, 33003, 33004, 33005, 34712, 34887, 34933, 34934, 50001, 50002, 52546)


def part_size(frame: Any) -> tuple[int, int]:
    """Height and width of a tile or strip of a page."""
    if frame.is_tiled:
        return frame.tilelength, frame.tilewidth
    return min(frame.rowsperstrip, frame.imagelength), frame.imagewidth


def by_row(frame: Any) -> bool:
    """True if pixels are stored as they are, row by row: any part is read without the others."""
    plain = frame.predictor == 1 and frame.fillorder == 1 and not frame.is_subsampled
    return plain and frame.compression == 1 and frame.is_contiguous


def read_window(
    page: Any,
    box: Box,
    samples: Sequence[int],
    fill: float | int,
    recent: Recent[Any] | None = None,
) -> np.ndarray:
    """Read the ``samples`` of the pixels in a box, which lies within the page: (h, w, samples).

    ``fill``: value of parts that are left out of the file.

    Raises:
        BadImage: a part is cut, or not of the size that the page says.
    """
    frame = page.keyframe
    if by_row(frame):
        return _from_rows(page, box, samples)
    parts = _Parts(page, recent)
    planar = frame.planarconfig == _SEPARATE and frame.samplesperpixel > 1
    if not planar:
        every = list(samples) == list(range(frame.samplesperpixel))
        found = np.empty((box.height, box.width, len(samples)), frame.dtype)
        parts.paste(found, box, 0, slice(None) if every else list(samples), fill)
        return found
    planes = np.empty((len(samples), box.height, box.width, 1), frame.dtype)
    for plane, sample in zip(planes, samples, strict=True):
        parts.paste(plane, box, sample, slice(None), fill)
    return planes[..., 0].transpose(1, 2, 0)


def _from_rows(page: Any, box: Box, samples: Sequence[int]) -> np.ndarray:
    """A window of what is stored row by row."""
    frame, handle = page.keyframe, page.parent.filehandle
    kind = frame.dtype.newbyteorder(page.parent.byteorder)
    planar = frame.planarconfig == _SEPARATE and frame.samplesperpixel > 1
    each = 1 if planar else frame.samplesperpixel
    pixel, start = each * kind.itemsize, page.dataoffsets[0]

    def rows(plane: int) -> np.ndarray:
        read = bytearray()
        for row in range(box.top, box.top + box.height):
            at = (plane * frame.imagelength + row) * frame.imagewidth + box.left
            handle.seek(start + at * pixel)
            read += handle.read(box.width * pixel)
        if len(read) != box.height * box.width * pixel:
            raise BadImage("truncated TIFF")
        stored = np.frombuffer(read, kind).reshape(box.height, box.width, each)
        return stored.astype(frame.dtype, copy=False)

    if planar:
        return np.concatenate([rows(sample) for sample in samples], axis=2)
    found = rows(0)
    return found if list(samples) == list(range(each)) else found[..., list(samples)]


class _Parts:
    """Tiles or strips of a page, in rows and columns, one grid for each separate band."""

    def __init__(self, page: Any, recent: Recent[Any] | None) -> None:
        self.page, self.frame, self.recent = page, page.keyframe, recent
        self.height, self.width = part_size(self.frame)
        self.rows = math.ceil(self.frame.imagelength / self.height)
        self.columns = math.ceil(self.frame.imagewidth / self.width)

    def paste(
        self, found: np.ndarray, box: Box, plane: int, samples: slice | list[int], fill: float | int
    ) -> None:
        """Fill ``found``, (h, w, bands), with a box of one grid."""
        bottom, right = box.top + box.height, box.left + box.width
        for row in range(box.top // self.height, -(-bottom // self.height)):
            for column in range(box.left // self.width, -(-right // self.width)):
                top, left = row * self.height, column * self.width
                ys = slice(max(box.top, top), min(bottom, top + self.height))
                xs = slice(max(box.left, left), min(right, left + self.width))
                to = found[ys.start - box.top : ys.stop - box.top, xs.start - box.left :][
                    :, : xs.stop - xs.start
                ]
                # The part may reach beyond the page, and is then needed by no other window.
                whole = to.shape[:2] == (
                    min(self.height, self.frame.imagelength - top),
                    min(self.width, self.frame.imagewidth - left),
                )
                part = self._part((plane * self.rows + row) * self.columns + column, whole)
                if part is None:
                    to[...] = fill
                else:
                    within = part[ys.start - top : ys.stop - top, xs.start - left : xs.stop - left]
                    to[...] = within[..., samples]

    def _part(self, index: int, whole: bool) -> np.ndarray | None:
        """A decoded part, (h, w, bands); None for one that is left out of the file.

        ``whole``: it lies in the window as a whole, so that no other window needs it.
        """
        if self.recent is None:
            return self._decode(index)
        key = id(self.page.parent), self.page.offset, index
        part = self.recent.find(key)
        if part is None:
            part = self._decode(index)
            if part is not None and not whole:
                self.recent.keep(key, part, part.nbytes)
        return part

    def _decode(self, index: int) -> np.ndarray | None:
        page, frame = self.page, self.frame
        count = page.databytecounts[index]
        if not count:
            return None
        handle = page.parent.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(count)
        if len(data) < count:
            raise BadImage("truncated TIFF")
        check_pixels(self.height * self.width)
        if frame.compression in OWN_SIZE:
            check_coded(data[: 1 << 16], self.height * self.width, frame.samplesperpixel)
        more = {}
        if frame.compression in JPEG:
            more = {"jpegtables": page.jpegtables, "jpegheader": frame.jpegheader}
        return np.asarray(frame.decode(data, index, **more)[0][0])


def check_coded(head: bytes, most: int, samples: int) -> None:
    """Check that a strip or tile asks for no more than the TIFF says it has, but for some rows."""
    size = coded_size(head)
    if size is not None and size[0] * size[1] > 2 * most + (1 << 16):
        raise BadImage(f"damaged TIFF: a part of {most} pixels holds {size[0]} x {size[1]}")
    if (found := jpeg2000_header(head)) is not None and found[2] > samples + 1:
        raise BadImage(f"damaged TIFF: a part of {samples} channels holds {found[2]}")
