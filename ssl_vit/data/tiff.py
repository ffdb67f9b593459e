"""TIFF images, by tifffile and imagecodecs: any codec, depth, layout, and number of planes.

Colour is what the file says: white-is-zero is inverted, palettes and CMYK become RGB where gray or
colour is asked for, YCbCr always. Opacity is a band like any other, its colours as stored, and is
dropped behind gray and RGB where these are asked for. Internal masks and GDAL_NODATA are missing
values. Reduced images (overviews, thumbnails) and masks are never planes; overviews are levels.

Integers of fewer than 8 bits are scaled to 0..255, as by Pillow; those of 9 to 15 are kept as in a
file of 16. White-is-zero floats have no largest value, and are kept as they are.
"""

import io
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.ome import lone_name, plane_count
from ssl_vit.data.raster import (
    ALL,
    BadImage,
    Box,
    OtherChannels,
    Raster,
    check_bands,
    check_pixels,
    chosen,
    counts_for,
    find_missing,
    nodata_value,
    wanted,
)
from ssl_vit.data.recent import Recent
from ssl_vit.data.scales import METADATA, scaled
from ssl_vit.data.tiff_colours import (
    PALETTE,
    REFUSED,
    WHITE_IS_ZERO,
    YCBCR,
    colour_count,
    coloured,
)
from ssl_vit.data.tiff_planes import MOST_PLANES, Stack
from ssl_vit.data.tiff_window import JPEG, OWN_SIZE, check_coded, part_size, read_window

# What it says of single files would stand between the lines of a run; what matters is a BadImage.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
_WEBP, _SEPARATE = 50001, 2  # of compression and planar configuration
_NODATA = 42113  # GDAL_NODATA


def read_tiff(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    """Read one plane of a TIFF. Raises as ``Plane.of`` and ``Plane.read``."""
    with open_tiff(io.BytesIO(raw)) as file:
        file.pages.cache = True  # each is asked for several times, and it is closed at once
        return Plane.of(file, channels, reading).read()


def open_tiff(stream: io.IOBase) -> Any:
    """Open a TIFF as a file of its own: nothing is read of other files of a set that it names."""
    opened: Any = tifffile.TiffFile  # its annotation lacks what Python's own streams are
    file = opened(stream, _multifile=False)
    if not file.is_ome:
        return file
    if plane_count(file.ome_metadata) > MOST_PLANES:
        raise BadImage("has an OME description with too many planes")
    name = lone_name(file.ome_metadata)
    if name is None:
        return file
    stream.seek(0)
    return opened(stream, name=name, _multifile=False)


@dataclass(frozen=True)
class Plane:
    """Plane of an open TIFF, in the bands or colours that are asked for.

    ``number``: of the plane in ``stack``. ``channels``: asked for; ALL where bands are chosen.
    ``declared``: the number that marks missing values, as text.
    """

    file: Any
    stack: Stack
    number: int
    channels: int
    reading: ReadConfig
    declared: str

    @classmethod
    def of(cls, file: Any, channels: int, reading: ReadConfig) -> "Plane":
        """The plane that ``reading`` asks for; its headers are read, and checked.

        Raises:
            BadImage: truncated, of colours that are not known, or without that plane, level, bands
                or number of channels.
        """
        channels = wanted(channels, reading)
        stack = Stack.of(file, channels, reading.level)
        page = stack.series.keyframe
        if page.photometric in REFUSED:
            what = REFUSED[page.photometric]
            raise BadImage(f"holds {what}, which are not converted: convert it to RGB or gray")
        number = stack.choose(reading)
        has = colour_count(page, stack.bands, channels)
        if channels != ALL and has not in counts_for(channels):
            raise _refusal(stack, has, channels)
        check_bands(reading, has)
        for part in stack.parts(number):
            check_layout(part, file.filehandle)
        declared = tag_of(stack, _NODATA)
        fill = nodata_value(declared, page.dtype) if page.dtype is not None else None
        page.nodata = 0 if fill is None else fill.item()  # for tiles that are left out of the file
        return cls(file, stack, number, channels, reading, declared)

    @property
    def page(self) -> Any:
        """Page whose properties all pages of the plane share."""
        return self.stack.series.keyframe

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.stack.height, self.stack.width

    @property
    def by_window(self) -> bool:
        """True if a part of it can be read without the rest."""
        return self.stack.by_window and not self._by_pillow

    @property
    def _by_pillow(self) -> bool:
        return self.page.photometric == YCBCR and self.page.compression not in JPEG

    def read(self, box: Box | None = None, recent: Recent[Any] | None = None) -> Raster:
        """Read it, or a part of one that is ``by_window``.

        ``recent``: decoded strips and tiles that may be wanted again.

        Raises:
            BadImage: too large, or damaged.
        """
        try:
            check_pixels(box.height * box.width if box else math.prod(self.size))
        except BadImage as error:
            raise BadImage(f"{error}; --data.tile reads it in parts") from None
        if self._by_pillow:
            first = self.stack.parts(self.number)[0].index
            return chosen(Raster(_by_pillow(self.file, first)), self.reading)
        stored, bands = self._stored(box, recent)
        missing = find_missing(stored, self.reading, self.declared)
        mask = self._mask(box, recent) if self.reading.nodata == "auto" else None
        if mask is not None:
            wide = np.repeat(mask[..., None], stored.shape[2], axis=2)
            missing = wide if missing is None else np.asarray(wide | missing)
        made = coloured(stored, missing, self.page, self.channels)
        if bands is None:
            made, bands = chosen(made, self.reading), self._own_bands(made.pixels.shape[2])
        if self.reading.values == "stored":
            return made
        return scaled(made, tag_of(self.stack, METADATA), bands)

    def _own_bands(self, count: int) -> list[int]:
        """Numbers in the file, from 0, of the bands that are read, of ``count`` in all."""
        return [band - 1 for band in self.reading.bands] or list(range(count))

    def _stored(
        self, box: Box | None, recent: Recent[Any] | None
    ) -> tuple[np.ndarray, list[int] | None]:
        """Values as stored (h, w, bands); and which bands, from 0, if they are chosen already.

        They are where none depends on others, and the others need not be read.
        """
        by_band = self.reading.bands and self.page.photometric not in (PALETTE, WHITE_IS_ZERO)
        if self.stack.by_window and (box or by_band):
            bands = self._own_bands(self.stack.bands) if by_band else None
            whole = Box(0, 0, *self.size)
            return self.stack.window(self.number, box or whole, bands, recent), bands
        for part in self.stack.parts(self.number):
            check_segments(part, self.file.filehandle)
        return self.stack.read(self.number), None

    def _mask(self, box: Box | None, recent: Recent[Any] | None) -> np.ndarray | None:
        """Pixels that GDAL's internal mask excludes, (h, w); None where it excludes none."""
        page = self._mask_page
        if page is None:
            return None
        if box:
            excluded = read_window(page, box, [0], 0, recent)[..., 0] == 0
        else:
            check_page(page, self.file.filehandle)
            excluded = np.asarray(page.asarray(maxworkers=1) == 0)
        return excluded if excluded.any() else None

    @cached_property
    def _mask_page(self) -> Any:
        """The page of the mask; None without one.

        It is between the page itself and the next image, among overviews and their masks.
        """
        index = self.stack.parts(self.number)[0].index
        while isinstance(index, int):
            index += 1
            try:
                page = self.file.pages.get(index)
            except IndexError:
                break
            if page.is_mask and page.shape[:2] == self.size:
                return page
            if not (page.is_reduced or page.is_mask):
                break
        return None


def tag_of(stack: Stack, code: int) -> str:
    """Text of a tag of an image, or of the one at full size of which it is a level."""
    pages = stack.series.keyframe, stack.base.keyframe
    found = (str(p.tags.valueof(code) or "") for p in pages if p.tags.get(code))
    return next(found, "")


def _refusal(stack: Stack, has: int, channels: int) -> OtherChannels:
    """Refusal of a file of another channel count."""
    more = ""
    if stack.set_of > 1:
        more = f": it is one of {stack.set_of} files of an image; join them in one file"
    elif (planes := len(stack.planes)) > 1:
        more = f" (in each of {planes} planes, axes {stack.names})"
    return OtherChannels(has, channels, more)


def check_page(page: Any, file: Any) -> None:
    """Check that all strips or tiles of a page are in the file and of a sane size, undecoded."""
    check_layout(page, file)
    check_segments(page, file)


def check_layout(page: Any, file: Any) -> None:
    """Check that all strips or tiles of a page are in the file, and how large a tile is.

    tifffile detects most of what is missing itself, but may search for seconds.
    """
    frame = page.keyframe
    if len(page.dataoffsets) < math.prod(frame.chunked):
        raise BadImage("truncated TIFF: parts of it are not listed")
    segments = zip(page.dataoffsets, page.databytecounts, strict=True)
    if max((at + count for at, count in segments), default=0) > file.size:
        raise BadImage("truncated TIFF")
    if not any(page.databytecounts) and _NODATA not in frame.tags:  # with it: all missing
        raise BadImage("has no data: none of its strips or tiles is in the file")
    if frame.is_tiled:
        if frame.compression == _WEBP and frame.planarconfig == _SEPARATE:
            # GDAL stores three channels in each, of which tifffile makes nothing.
            raise BadImage("holds WebP tiles of single bands: write it with INTERLEAVE=PIXEL")
        check_pixels(frame.tilewidth * frame.tilelength * frame.tiledepth)


def check_segments(page: Any, file: Any) -> None:
    """Check that no strip or tile of a page asks for more than the TIFF says it has."""
    frame = page.keyframe
    if frame.compression not in OWN_SIZE:
        return
    most = math.prod(part_size(frame)) * (frame.tiledepth if frame.is_tiled else 1)
    for at, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(at)
        check_coded(file.read(min(count, 1 << 16)), most, frame.samplesperpixel)


def _by_pillow(file: Any, page: int) -> np.ndarray:
    """Read YCbCr that is not in JPEG by Pillow, also with fewer samples of colour."""
    file.filehandle.seek(0)
    with Image.open(io.BytesIO(file.filehandle.read()), formats=("TIFF",)) as image:
        image.seek(page)
        return np.array(image.convert("RGB"))
