"""Pixels between a file and a tensor: kinds of number, missing values, channels.

Values: 8-bit images stay uint8. Unsigned 16-bit images become float32 in [0, 1] by division by
65535, so that they keep their depth; 12-bit data in a 16-bit file then lies in [0, 1/16], which
the data statistics take care of. Floats and all other integers become float32 as they are; bool
becomes 0 and 255. Missing values are NaN: an 8-bit image that has some becomes float32 in [0, 1].
"""

import re
from typing import NamedTuple

import numpy as np
import torch

from ssl_vit.common.reading import ReadConfig

MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow and JPEG

_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-f]+>")
ALL = 0
"""Number of channels that stands for all that a file has."""
_COUNTS = {ALL: (), 1: (1, 3), 3: (3, 1)}


class BadImage(Exception):  # noqa: N818  # a finding about data, not a failure
    """Unreadable image: it cannot be read or decoded; the message is the reason."""


def reason(error: Exception) -> str:
    """Reason of a library's error, the same whenever the same image is read: Pillow's has the
    address of the stream that it read from."""
    return f"{type(error).__name__}: {_ADDRESS.sub('', str(error))}"


class OtherChannels(BadImage):
    """Image of ``has`` channels, where ``asked`` are asked for; ``more``: said beside that."""

    def __init__(self, has: int, asked: int, more: str = "") -> None:
        super().__init__(f"has {has} channel{'s' * (has != 1)}, --data.channels is {asked}{more}")
        self.has, self.asked, self.more = has, asked, more


class EmptyTile(BadImage):
    """Tile of an image without a single pixel that has data."""


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Raster(NamedTuple):
    """Pixels as a file stores them.

    ``pixels``: (H, W, C), of any kind of number. ``missing``: bool, of the same shape, True where
    there is no data; None: nowhere.
    """

    pixels: np.ndarray
    missing: np.ndarray | None = None


def check_pixels(pixels: int) -> None:
    """Check the size of an image, before memory is taken for it.

    Raises:
        BadImage: it has more pixels than an image may have.
    """
    if pixels > MAX_PIXELS:
        raise BadImage(f"has {pixels} values per channel, more than {MAX_PIXELS}: too large")


def counts_for(channels: int) -> tuple[int, ...]:
    """Channel counts of files that can be read as ``channels``, the best first."""
    return _COUNTS.get(channels, (channels,))


def wanted(channels: int, reading: ReadConfig) -> int:
    """Channels that a file must have to be read as ``channels``; ALL where bands are chosen."""
    return ALL if reading.bands else channels


def chosen(raster: Raster, reading: ReadConfig) -> Raster:
    """The bands of a file that ``reading`` asks for.

    Raises:
        BadImage: it has not all of them.
    """
    if not reading.bands:
        return raster
    check_bands(reading, raster.pixels.shape[2])
    index = [band - 1 for band in reading.bands]
    missing = None if raster.missing is None else raster.missing[..., index]
    return Raster(raster.pixels[..., index], missing)


def check_bands(reading: ReadConfig, has: int) -> None:
    """Check that a file has the bands that are asked for.

    Raises:
        BadImage: it has not.
    """
    if lacks := [band for band in reading.bands if band > has]:
        asked = f"--data.bands asks for band {lacks[0]}, counted from 1"
        raise BadImage(f"has {has} band{'s' * (has != 1)}; {asked}")


def choose_plane(reading: ReadConfig, count: int) -> int:
    """Choose one of ``count`` planes: the one that is asked for, or the middle one.

    Raises:
        BadImage: there is no such plane.
    """
    if reading.slices == "middle" or not reading.slices.isdecimal():
        return count // 2
    if int(reading.slices) >= count:
        planes = "plane" if count == 1 else "planes, from 0"
        raise BadImage(f"has {count} {planes}; --data.slices is {reading.slices}")
    return int(reading.slices)


def nodata_value(text: str, dtype: np.dtype) -> np.generic | None:
    """Parse the number that marks missing values; None for one that the dtype cannot hold.

    Text of GDAL_NODATA: a decimal number, nan, inf, or what old compilers wrote (``-1.#IND``).
    """
    text = text.strip("\0 \t\r\n").lower().replace(",", ".")
    text = "nan" if "#ind" in text or "#qnan" in text else text.replace("1.#inf", "inf")
    try:
        number: float = float(text)
        if dtype.kind in "iub":
            # Not through a float: it holds no integer beyond 2 ** 53 exactly.
            whole = int(text) if text.lstrip("+-").isdecimal() else int(number)
            fits = whole == number or text.lstrip("+-").isdecimal()
            low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            return dtype.type(whole) if fits and low <= whole <= high else None
    except (ValueError, OverflowError):  # no number; nan and infinity are no integers
        return None
    if dtype.kind != "f":
        return None
    with np.errstate(over="ignore"):
        value = dtype.type(number)
    return None if np.isinf(value) and not np.isinf(number) else value


def find_missing(pixels: np.ndarray, reading: ReadConfig, declared: str = "") -> np.ndarray | None:
    """Find the values without data, as stored; None where all are data.

    ``declared``: the number that the file declares, as text. A number of ``reading`` replaces it;
    NaN is never data, unless ``reading`` says that everything is.
    """
    if reading.nodata == "none":
        return None
    missing = np.isnan(pixels) if pixels.dtype.kind == "f" else None
    text = declared if reading.nodata == "auto" else reading.nodata
    value = nodata_value(text, pixels.dtype) if text else None
    if value is not None and value == value:
        equal = pixels == value
        missing = equal if missing is None else missing | equal
    return missing if missing is not None and missing.any() else None


def to_tensor(raster: Raster, channels: int) -> torch.Tensor:
    """Convert to (channels, H, W), uint8 or float32; the tensor owns its memory.

    Raises:
        BadImage: empty, no numbers, infinite values, or another channel count.
    """
    hwc = to_number(*raster)
    has = hwc.shape[2]
    if has not in counts_for(channels):
        raise OtherChannels(has, channels)
    if has == 3 and channels == 1:
        hwc = _luminance(hwc)
    if has == 1 and channels == 3:
        hwc = np.broadcast_to(hwc, (*hwc.shape[:2], 3))
    return torch.from_numpy(np.array(hwc.transpose(2, 0, 1), order="C"))


def to_number(pixels: np.ndarray, missing: np.ndarray | None) -> np.ndarray:
    """Convert to uint8 or float32 by the rules in the module's docstring."""
    if pixels.size == 0:
        raise BadImage(f"is empty: an array of shape {pixels.shape}")
    if pixels.dtype == np.uint8 and missing is None:
        return pixels
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind not in "biuf":
        raise BadImage(f"holds {pixels.dtype} values, not numbers")
    if kind == "b":
        pixels = pixels.astype(np.uint8) * np.uint8(255)
        if missing is None:
            return pixels
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, refused below
        numbers = pixels.astype(np.float32)
    if kind == "b" or (kind == "u" and size <= 2):
        numbers /= np.float32(255 if pixels.dtype == np.uint8 else 65535)
    if missing is not None:
        numbers[missing] = np.nan
    if kind == "f":
        _check_finite(numbers, missing is not None)
    return numbers


def _check_finite(numbers: np.ndarray, missing: bool) -> None:
    if np.isinf(numbers).any():
        raise BadImage("holds infinite values; --data.nodata inf takes them for missing ones")
    if not missing and np.isnan(numbers).any():
        raise BadImage("holds NaN, which is no data; --data.nodata auto takes it for missing")


def _luminance(rgb: np.ndarray) -> np.ndarray:
    gray = (rgb.astype(np.float32) @ _LUMINANCE)[..., None]
    return np.rint(gray).astype(np.uint8) if rgb.dtype == np.uint8 else gray
