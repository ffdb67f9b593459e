"""TIFF images, by tifffile and imagecodecs: any codec, depth, layout, and number of planes.

Colour is what the file says: white-is-zero is inverted, palettes and CMYK become RGB where gray or
colour is asked for, YCbCr always. Opacity is a band like any other, its colours as stored, and is
dropped behind gray and RGB where these are asked for. Internal masks and GDAL_NODATA are missing
values. Reduced images (overviews, thumbnails) and masks are never planes.

Integers of fewer than 8 bits are scaled to 0..255, as by Pillow; those of 9 to 15 are kept as in a
file of 16. White-is-zero floats have no largest value, and are kept as they are.
"""

import io
import logging
import math
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from ssl_vit.common.config import ReadConfig
from ssl_vit.data.headers import coded_size, jpeg2000_header
from ssl_vit.data.ome import lone_name, plane_count
from ssl_vit.data.raster import (
    BadImage,
    OtherChannels,
    Raster,
    check_pixels,
    counts_for,
    find_missing,
    nodata_value,
)
from ssl_vit.data.tiff_planes import MOST_PLANES, Stack

# What it says of single files would stand between the lines of a run; what matters is a BadImage.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_REFUSED = {
    8: "CIELab colours",
    9: "ICCLab colours",
    10: "ITULab colours",
    32803: "the raw data of a camera",
    32844: "LogL luminance",
    32845: "LogLuv colours",
    34892: "the raw data of a camera",
}
_WEBP, _SEPARATE = 50001, 2  # of compression and planar configuration
_ALPHA = ((1,), (2,))  # associated and unassociated
_JPEG = (6, 7, 33007, 34892)
# Codecs that allocate what the header of their own data asks for, not what the TIFF says.
_OWN_SIZE = (*_JPEG, 22610, 33003, 33004, 33005, 34712, 34887, 34933, 34934, 50001, 50002, 52546)


def read_tiff(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    """Read one plane of a TIFF. Raises as ``read_plane``."""
    with open_tiff(io.BytesIO(raw)) as file:
        return read_plane(file, channels, reading)


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


def read_plane(file: Any, channels: int, reading: ReadConfig) -> Raster:
    """Read the plane that ``reading`` asks for, in the colours that ``channels`` asks for.

    Raises:
        BadImage: truncated, too large, of colours that are not known, or without that plane.
    """
    stack = Stack.of(file, channels)
    page = stack.series.keyframe
    if page.photometric in _REFUSED:
        what = _REFUSED[page.photometric]
        raise BadImage(f"holds {what}, which are not converted: convert it to RGB or gray")
    number = stack.choose(reading)
    has = _colour_count(page, stack.bands, channels)
    if has not in counts_for(channels):
        raise _refusal(stack, has, channels)
    check_pixels(stack.height * stack.width)
    for part in stack.parts(number):
        check_page(part, file.filehandle)
    declared = str(page.tags.valueof(42113) or "") if page.tags.get(42113) else ""
    fill = nodata_value(declared, page.dtype) if page.dtype is not None else None
    page.nodata = 0 if fill is None else fill.item()  # for tiles that are left out of the file
    if page.photometric == _YCBCR and page.compression not in _JPEG:
        return Raster(_by_pillow(file, stack.parts(number)[0].index))
    stored = stack.read(number)
    missing = find_missing(stored, reading, declared)
    mask = _mask(file, stack, number) if reading.nodata == "auto" else None
    if mask is not None:
        missing = mask if missing is None else np.asarray(mask | missing)
    return _coloured(stored, missing, page, channels)


def _refusal(stack: Stack, has: int, channels: int) -> OtherChannels:
    """Refusal of a file of another channel count."""
    more = ""
    if stack.set_of > 1:
        more = f": it is one of {stack.set_of} files of an image; join them in one file"
    elif (planes := len(stack.planes)) > 1:
        more = f" (in each of {planes} planes, axes {stack.names})"
    return OtherChannels(has, channels, more)


def _colour_count(page: Any, bands: int, channels: int) -> int:
    """Channels of an image after its colours are converted."""
    if page.photometric == _PALETTE:
        return 3
    if channels in (1, 3):
        if page.photometric == _CMYK and bands in (4, 5):
            return 3
        if tuple(page.extrasamples) in _ALPHA:
            plain = {_RGB: 3, _YCBCR: 3, _WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1}
            return plain.get(page.photometric, bands)
    return bands


def check_page(page: Any, file: Any) -> None:
    """Check that all strips or tiles of a page are in the file and of a sane size, undecoded.

    tifffile detects most of what is missing itself, but may search for seconds.
    """
    frame = page.keyframe
    if len(page.dataoffsets) < math.prod(frame.chunked):
        raise BadImage("truncated TIFF: parts of it are not listed")
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if max((at + count for at, count in segments), default=0) > file.size:
        raise BadImage("truncated TIFF")
    if not any(page.databytecounts) and 42113 not in frame.tags:  # with that number: all missing
        raise BadImage("has no data: none of its strips or tiles is in the file")
    if frame.is_tiled:
        if frame.compression == _WEBP and frame.planarconfig == _SEPARATE:
            # GDAL stores three channels in each, of which tifffile makes nothing.
            raise BadImage("holds WebP tiles of single bands: write it with INTERLEAVE=PIXEL")
        most = frame.tilewidth * frame.tilelength * frame.tiledepth
        check_pixels(most)
    else:
        most = frame.imagewidth * min(frame.rowsperstrip, frame.imagelength)
    if frame.compression in _OWN_SIZE:
        for at, count in segments:
            file.seek(at)
            _check_segment(file.read(min(count, 1 << 16)), most, frame.samplesperpixel)


def _check_segment(head: bytes, most: int, samples: int) -> None:
    """Check that a strip or tile asks for no more than the TIFF says it has, but for some rows."""
    size = coded_size(head)
    if size is not None and size[0] * size[1] > 2 * most + (1 << 16):
        raise BadImage(f"damaged TIFF: a part of {most} pixels holds {size[0]} x {size[1]}")
    if (found := jpeg2000_header(head)) is not None and found[2] > samples + 1:
        raise BadImage(f"damaged TIFF: a part of {samples} channels holds {found[2]}")


def _by_pillow(file: Any, page: int) -> np.ndarray:
    """Read YCbCr that is not in JPEG by Pillow, also with fewer samples of colour."""
    file.filehandle.seek(0)
    with Image.open(io.BytesIO(file.filehandle.read()), formats=("TIFF",)) as image:
        image.seek(page)
        return np.array(image.convert("RGB"))


def _mask(file: Any, stack: Stack, number: int) -> np.ndarray | None:
    """Pixels that GDAL's internal mask excludes, (H, W, C); None where it excludes none.

    The mask is a page between the image's own and the next image, beside its overviews.
    """
    index = stack.parts(number)[0].index
    if not isinstance(index, int):
        return None
    while True:
        index += 1
        try:
            page = file.pages.get(index)
        except IndexError:
            return None
        if page.is_reduced:
            continue
        if not page.is_mask:
            return None
        if page.shape[:2] == (stack.height, stack.width):
            break
    check_page(page, file.filehandle)
    excluded = np.asarray(page.asarray(maxworkers=1) == 0)
    if not excluded.any():
        return None
    return np.repeat(excluded[..., None], stack.bands, axis=2)


def _coloured(stored: np.ndarray, missing: np.ndarray | None, page: Any, channels: int) -> Raster:
    """Convert the values as stored to black-is-zero gray, RGB, or bands."""
    if page.photometric == _PALETTE:
        return Raster(_from_palette(stored[..., 0], page), _of_any(missing, 1))
    bits = page.bitspersample
    if page.photometric == _WHITE_IS_ZERO:
        stored = inverted(stored, bits, stored.shape[2] - len(page.extrasamples))
    count = _colour_count(page, stored.shape[2], channels)
    if page.photometric == _CMYK and count == 3:
        return Raster(_from_cmyk(stored), _of_any(missing, 4))
    if isinstance(bits, int) and 1 < bits < 8 and stored.dtype == np.uint8:
        stored = np.rint(stored * np.float32(255 / (2**bits - 1))).astype(np.uint8)
    return Raster(stored[..., :count], None if missing is None else missing[..., :count])


def _of_any(missing: np.ndarray | None, bands: int) -> np.ndarray | None:
    """Missing in RGB: where any of the first ``bands`` is that it was made of."""
    if missing is None:
        return None
    lost = np.logical_or.reduce(missing[..., :bands], axis=2, keepdims=True)
    return np.repeat(lost, 3, axis=2)


def inverted(stored: np.ndarray, bits: Any, colours: int) -> np.ndarray:
    """White-is-zero values with black as zero, of the first ``colours`` bands; floats as they are.

    The largest value of unsigned integers is that of their bits; signed ones change sign, less 1.
    """
    if stored.dtype.kind not in "bui":
        return stored
    turned = ~stored
    if stored.dtype.kind == "u" and isinstance(bits, int) and bits < 8 * stored.dtype.itemsize:
        turned = np.array(2**bits - 1, dtype=stored.dtype) - stored
    return np.concatenate([turned[..., :colours], stored[..., colours:]], axis=2)


def _from_palette(index: np.ndarray, page: Any) -> np.ndarray:
    """RGB, uint8, of palette indices; the high bytes of a palette's 16 bits, as by Pillow."""
    palette = page.colormap
    if palette is None:
        raise BadImage("has colours by palette, and no palette")
    # Some writers have put 8 bits where 16 belong; libtiff tells it in the same way.
    palette = palette if palette.max() < 256 else palette >> 8
    return palette.astype(np.uint8).T[index.astype(np.intp)]


def _from_cmyk(stored: np.ndarray) -> np.ndarray:
    """RGB of the first four bands: (1 - ink) (1 - black), as by Pillow."""
    whole = stored.dtype.kind in "iu"
    top = float(np.iinfo(stored.dtype).max) if whole else 1.0
    inks = stored[..., :4].astype(np.float64)
    rgb = (top - inks[..., :3]) * (top - inks[..., 3:]) / top
    return np.rint(rgb).astype(stored.dtype) if whole else rgb
