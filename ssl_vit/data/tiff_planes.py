"""Planes of a TIFF: which pages, and which of their axes, make one image.

Axes are named by the file (OME, ImageJ and other microscopes' metadata, or tifffile's own) or not.
X and Y are an image's, C (channels) and S (samples of a pixel) its channels, and every other named
axis (Z, T, positions) counts planes. Axes without a name are pages, and count planes, with two
exceptions, as arrays are written without a word on what their axes are:

- as many pages as ``--data.channels``, if that is neither 1 nor 3: a page is a channel. Three pages
  without a name are more often a stack than red, green and blue.
- pages of a width that is a number of channels: the array was (H, W, C), and a page is a row of it.

Where bands are asked for, such pages are bands in any case.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.ome import own_part
from ssl_vit.data.raster import ALL, BadImage, Box, choose_plane, counts_for
from ssl_vit.data.recent import Recent
from ssl_vit.data.tiff_window import read_window

MOST_PLANES = 1 << 24
_UNNAMED = "IQ"
# Tags without which pixels would be read as something else: bits, description (axes), palette,
# opacity, kind of number, missing values.
_OF_PIXELS = (258, 270, 320, 338, 339, 42113)
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}
_WIDE = {4: "I", 8: "Q"}  # counts and offsets of a TIFF, and of a BigTIFF


@dataclass(frozen=True)
class Stack:
    """Planes of the first image in a file.

    ``names``: tifffile's letters of the axes of ``shape``. ``roles``: of each axis: y, x, c for
    channels, or p for planes. ``set_of``: the number of files that the image is spread over.
    ``base``: tifffile's series of the image at full size, of which this may be a level.
    """

    series: Any
    names: str
    shape: tuple[int, ...]
    roles: str
    set_of: int = 1
    base: Any = None

    @classmethod
    def of(cls, file: Any, channels: int, level: int = 0) -> "Stack":
        """Planes of an opened file, at a level of its pyramid; reads its headers only."""
        base = _full_size(file.series)
        series = _at_level(base, level)
        _check_chain(file)
        _check_tags(file, series.keyframe)
        names, shape = series.get_axes(True), tuple(series.get_shape(True))
        page, files = series.keyframe, 1
        if file.is_ome and series.kind != "ome" and not level:
            names, shape, files = own_part(file.ome_metadata, series) or (names, shape, 1)
        if "Y" not in names or "X" not in names:  # named as the writer pleased
            names = "Q" * (len(shape) - len(page.axes)) + page.axes
        if shape[len(shape) - len(page.shape) :] != tuple(page.shape):
            raise BadImage(f"has axes {names} of {shape}, which its pages of {page.shape} are not")
        if math.prod(shape) // max(math.prod(page.shape), 1) > MOST_PLANES:
            raise BadImage(f"has axes {names} of {shape}: too many planes")
        return cls(series, names, shape, _roles(names, shape, channels), files, base)

    @property
    def height(self) -> int:
        return self.shape[self.roles.index("y")]

    @property
    def width(self) -> int:
        return self.shape[self.roles.index("x")]

    @property
    def bands(self) -> int:
        """Number of channels in the file."""
        return math.prod(self._sizes("c"))

    def _sizes(self, role: str) -> list[int]:
        return [n for n, own in zip(self.shape, self.roles, strict=True) if own == role]

    @cached_property
    def planes(self) -> np.ndarray:
        """Numbers of the planes that the file has: all, unless it lacks pages of them."""
        count = math.prod(self._sizes("p"))
        spread = self._by_page and self.series.kind in ("ome", "mmstack")
        lacks = [page is None for page in self.series] if spread else []
        if not any(lacks):
            return np.arange(count)
        return np.array([i for i in range(count) if not any(lacks[n] for n in self.pages(i))])

    def choose(self, reading: ReadConfig) -> int:
        """Number of the plane that ``reading`` asks for; the middle is that of every axis.

        Raises:
            BadImage: there is no such plane.
        """
        sizes = self._sizes("p")
        if not len(self.planes):
            raise BadImage("has none of the planes that it names")
        if not reading.slices.isdecimal() and len(self.planes) == math.prod(sizes) and sizes:
            return int(np.ravel_multi_index([n // 2 for n in sizes], sizes))
        return int(self.planes[choose_plane(reading, len(self.planes))])

    @property
    def _outer(self) -> int:
        """Number of axes that count pages; the others are within a page."""
        return len(self.shape) - len(self.series.keyframe.shape)

    @property
    def _by_page(self) -> bool:
        """True if every page is listed; else the first stands for all, one behind the other."""
        return len(self.series) == math.prod(self.shape[: self._outer])

    def _selection(self, plane: int) -> tuple[int | slice, ...]:
        at = iter(np.unravel_index(plane, self._sizes("p")) if "p" in self.roles else ())
        return tuple(int(next(at)) if role == "p" else slice(None) for role in self.roles)

    def pages(self, plane: int) -> list[int]:
        """Numbers, in the series, of the pages that a plane is made of."""
        outer = self.shape[: self._outer]
        grid = np.arange(math.prod(outer)).reshape(outer)
        return np.atleast_1d(grid[self._selection(plane)[: self._outer]]).ravel().tolist()

    def parts(self, plane: int) -> list[Any]:
        """Pages of tifffile that a plane is read from, and the last of all, which is cut first."""
        if not self._by_page:
            return [self.series[0]]
        last = int(self.planes[-1])
        return [self.series[i] for i in (*self.pages(plane), self.pages(last)[-1])]

    def read(self, plane: int) -> np.ndarray:
        """Read a plane: (H, W, C), as stored."""
        select = self._selection(plane)
        kept = [n for n, s in zip(self.shape, select, strict=True) if isinstance(s, slice)]
        within = tuple(select[self._outer :])
        pages = [self._page(number)[within] for number in self.pages(plane)]
        array = pages[0] if len(pages) == 1 else np.stack(pages)
        roles = self.roles.replace("p", "")
        order = [roles.index("y"), roles.index("x")]
        order += [axis for axis, role in enumerate(roles) if role == "c"]
        hwc = array.reshape(kept).transpose(order)
        return hwc.reshape(*hwc.shape[:2], -1)

    @property
    def by_window(self) -> bool:
        """True if a part of a plane can be read: if its pages are images, listed one by one."""
        inner, page = self.roles[self._outer :], self.series.keyframe
        return self._by_page and inner in ("yx", "yxc", "cyx") and page.imagedepth == 1

    def window(
        self, plane: int, box: Box, bands: Sequence[int] | None, recent: Recent[Any] | None = None
    ) -> np.ndarray:
        """Read a part of a plane that is ``by_window``: (h, w, bands), as stored.

        ``bands``: from 0; None: all. ``recent``: decoded strips and tiles that may be wanted again.
        """
        pages = [self._listed(number) for number in self.pages(plane)]
        each = self.bands // len(pages)
        wanted = list(range(self.bands)) if bands is None else list(bands)
        of = [band // each for band in wanted]  # the page of each
        fill = self.series.keyframe.nodata
        parts = []
        for number in dict.fromkeys(of):
            own = [band % each for band, n in zip(wanted, of, strict=True) if n == number]
            parts.append(read_window(pages[number], box, own, fill, recent))
        if len(parts) == 1:
            return parts[0]
        found = np.empty((box.height, box.width, len(wanted)), parts[0].dtype)
        for number, part in zip(dict.fromkeys(of), parts, strict=True):
            found[..., [i for i, n in enumerate(of) if n == number]] = part
        return found

    def _listed(self, number: int) -> Any:
        """A page of the series, which knows what all have in common."""
        page = self.series[number]
        if page.keyframe is None:
            page.keyframe = self.series.keyframe
        return page

    def _page(self, number: int) -> np.ndarray:
        keyframe = self.series.keyframe
        if self._by_page:
            return self._listed(number).asarray(maxworkers=1)
        offset = self.series.dataoffset
        if offset is None:
            raise BadImage(f"lacks pages: it names {self.names} of {self.shape}")
        file, pages = keyframe.parent, math.prod(self.shape[: self._outer])
        if offset + pages * keyframe.nbytes > file.filehandle.size:
            raise BadImage("truncated TIFF")
        file.filehandle.seek(offset + number * keyframe.nbytes)
        data = file.filehandle.read(keyframe.nbytes)
        stored = np.frombuffer(data, keyframe.dtype.newbyteorder(file.byteorder))
        return stored.astype(keyframe.dtype).reshape(keyframe.shape)


def _full_size(series: list[Any]) -> Any:
    """The first image that is neither reduced nor a mask; the first one if none is.

    Raises:
        BadImage: there is no image.
    """
    if not series:
        raise BadImage("holds no image")
    page = (s for s in series if not s.keyframe.is_reduced and not s.keyframe.is_mask)
    return next(page, series[0])


def _at_level(series: Any, level: int) -> Any:
    """A level of an image's pyramid.

    Raises:
        BadImage: there is no such level.
    """
    has = len(series.levels)
    if level >= has:
        levels = "levels, from 0" if has > 1 else "level"
        raise BadImage(f"has {has} {levels}; --data.level is {level}")
    return series.levels[level]


def _check_chain(file: Any) -> None:
    """Check that the list of pages ends as it should: a file that was cut ends in the middle."""
    if file.is_scanimage or file.is_ndpi or file.is_lsm:  # whose lists tifffile makes up
        return
    at = file.pages.next_page_offset
    if at:
        file.filehandle.seek(at)
        if file.filehandle.read(file.tiff.offsetsize) != bytes(file.tiff.offsetsize):
            raise BadImage("truncated TIFF: its list of pages is cut")


def _check_tags(file: Any, page: Any) -> None:
    """Check that what a page says of its pixels is in the file: tifffile reads on without it."""
    handle, form = file.filehandle, file.tiff
    handle.seek(page.offset)
    count = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))[0]
    entries = handle.read(count * form.tagsize)
    wide = form.offsetsize
    for at in range(0, len(entries), form.tagsize):
        code, kind = struct.unpack_from(file.byteorder + "HH", entries, at)
        number, offset = struct.unpack_from(form.byteorder + 2 * _WIDE[wide], entries, at + 4)
        size = number * _SIZES.get(kind, 1)
        if code in _OF_PIXELS and size > wide and offset + size > handle.size:
            raise BadImage("truncated TIFF: what it says of itself is not all in it")


def _roles(names: str, shape: tuple[int, ...], channels: int) -> str:
    """Role of each axis, by the rules in the module's docstring."""
    roles = "".join({"Y": "y", "X": "x", "C": "c", "S": "c"}.get(name, "p") for name in names)
    if "C" in names and "S" in names:  # several colour images, unless all are asked for
        samples, each = names.index("S"), names.index("C")
        if shape[samples] * shape[each] != channels and shape[samples] in counts_for(channels):
            return roles[:each] + "p" + roles[each + 1 :]
    before = roles.index("y") - 1
    if "c" in roles or before < 0 or names[before] not in _UNNAMED:
        return roles
    if channels == ALL:  # the shorter axis, as of an array
        last = roles.endswith("pyx") and shape[-1] < shape[before]
        return roles[:before] + ("yxc" if last else "c" + roles[before + 1 :])
    if roles.endswith("pyx") and shape[-1] in counts_for(channels):
        return roles[:before] + "yxc"
    if shape[before] == channels and channels not in (1, 3):
        return roles[:before] + "c" + roles[before + 1 :]
    return roles
