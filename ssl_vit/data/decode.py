"""Image decoding: encoded bytes or arrays to tensors; any failure raises `BadImage`.

What a file is, is known by its first bytes, independent of its name. How values become numbers is
described in ``raster``, what is done with TIFF in ``tiff``, with DICOM in ``dicom``, and with all
other formats in ``stills``.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data import stills
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.headers import jpeg_size
from ssl_vit.data.raster import (
    ALL,
    MAX_PIXELS,
    BadImage,
    Box,
    OtherChannels,
    Raster,
    check_bands,
    check_pixels,
    choose_plane,
    chosen,
    counts_for,
    find_missing,
    reason,
    to_tensor,
    wanted,
)

__all__ = ["MAX_PIXELS", "BadImage", "Decoded", "OtherChannels", "array_planes", "decode"]

_DEFAULT = ReadConfig()
_READERS: dict[str, Callable[[bytes | bytearray, int, ReadConfig], Raster]] = {
    "PNG": stills.read_png,
    "PPM": stills.read_ppm,
    "JPEG2000": stills.read_jpeg2000,
    "JPEGXL": stills.read_jpegxl,
    "HEIF": stills.read_heif,
}
# Groups 2 and 8, by which a DICOM begins that lacks its preamble: known by its extension only.
_DICOM_STARTS = (b"\2\0", b"\b\0", b"\0\b")


class Decoded(np.ndarray):
    """Decoded image, (C, H, W) uint8 or float32: one that ``decode`` has made, and only passes.

    Nothing else holds its memory.
    """


def decode(
    raw: bytes | bytearray | np.ndarray, channels: int, reading: ReadConfig | None = None
) -> torch.Tensor:
    """Decode an image to (channels, H, W), uint8, or float32 for deeper data; NaN where missing.

    `reading`: which plane of several, and which pixels are without data, if not as by default.

    Where `reading` names bands the image has these alone. With 3 channels gray is repeated, and
    alpha, palette and CMYK become RGB. With 1 channel RGB becomes luminance. Any other count must
    be the image's own; an array may be (H, W), (H, W, C) or (C, H, W); if both of the latter fit,
    (H, W, C) is used. Elements that an array masks are missing. The tensor owns its memory.

    Raises:
        BadImage: truncated, corrupt, empty, too large, not an image, or another channel count.
    """
    reading = reading or _DEFAULT
    try:
        if isinstance(raw, Decoded):
            return _again(raw, channels)
        if isinstance(raw, np.ndarray):
            raster: Raster | torch.Tensor = from_array(raw, channels, reading, planes=1)
        else:
            raster = _read(raw, channels, reading)
        return raster if isinstance(raster, torch.Tensor) else to_tensor(raster, channels)
    except BadImage:
        raise
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, zlib.error
        raise BadImage(reason(error)) from error


def _again(image: Decoded, channels: int) -> torch.Tensor:
    """Take a decoded image, in the wanted channels; its memory goes on with the tensor."""
    if image.shape[0] == channels:
        return torch.from_numpy(np.asarray(image))
    hwc = np.asarray(image).transpose(1, 2, 0)
    return to_tensor(Raster(hwc, np.isnan(hwc) if hwc.dtype.kind == "f" else None), channels)


def _read(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster | torch.Tensor:
    """Decode by the file's first bytes, independent of its name and extension."""
    if not raw:
        raise BadImage("is empty (0 bytes)")
    kind = "JPEGXL" if raw[:2] == b"\xff\x0a" else format_of(bytes(raw[:HEAD]))
    if kind == "TIFF":
        from ssl_vit.data.tiff import read_tiff  # tifffile takes as long to import as Pillow

        return read_tiff(raw, channels, reading)
    if reading.level:
        raise BadImage(f"has no levels; --data.level is {reading.level}")
    if kind == "NPY":
        array = read_npy(raw)
        count = array_planes(array.shape, wanted(channels, reading))
        return from_array(array, channels, reading, count)
    if raw[:2] == b"\xff\xd8" and not reading.bands:
        return _read_jpeg(raw, channels, reading)
    return chosen(_read_other(raw, kind, wanted(channels, reading), reading), reading)


def _read_other(raw: bytes | bytearray, kind: str, channels: int, reading: ReadConfig) -> Raster:
    if raw[:2] == b"\xff\xd8":
        return stills.other_jpeg(raw, channels, reading)
    if kind == "DICOM" or (not kind and raw[:2] in _DICOM_STARTS):
        return _read_dicom(raw, channels, reading)
    if kind in _READERS:
        return _READERS[kind](raw, channels, reading)
    return stills.read_pil(raw, kind, channels, reading)


def _read_jpeg(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster | torch.Tensor:
    choose_plane(reading, 1)
    size = jpeg_size(raw)
    if channels not in (1, 3) or size is None or stills.nodata_given(reading):
        return stills.other_jpeg(raw, channels, reading)
    check_pixels(size[0] * size[1])  # torchvision allocates any size in the header
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    buffer = raw if isinstance(raw, bytearray) else bytearray(raw)  # torch wants it writable
    try:
        return decode_jpeg(torch.frombuffer(buffer, dtype=torch.uint8), mode=mode)
    except RuntimeError as error:
        if "truncated" in str(error):
            raise BadImage("truncated JPEG") from error
        return stills.other_jpeg(raw, channels, reading)


def _read_dicom(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    try:
        from ssl_vit.data.dicom import read_dicom
    except ImportError as error:
        raise BadImage("a DICOM image needs: pip install 'ssl_vit[dicom]' (or pydicom)") from error
    return read_dicom(io.BytesIO(raw), channels, reading)


def npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first index runs fastest, and kind of number of a NPY file."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def read_npy(raw: bytes | bytearray) -> np.ndarray:
    """The array of a NPY file, without a copy; Python objects are refused, not loaded."""
    stream = io.BytesIO(raw)
    shape, fortran, dtype = npy_header(stream)
    if dtype.hasobject:
        raise BadImage("holds Python objects, not numbers")
    values = np.frombuffer(raw, dtype, math.prod(shape), stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def array_planes(shape: tuple[int, ...], channels: int) -> int:
    """Number of planes in the array of a file: 1 for an image, else as long as its first axis."""
    counts = counts_for(channels)
    if len(shape) == 3:
        if channels == ALL:
            return 1
        return 1 if shape[2] in counts or shape[0] in counts else shape[0]
    return shape[0] if len(shape) == 4 else 1


def from_array(
    array: np.ndarray, channels: int, reading: ReadConfig, planes: int, box: Box | None = None
) -> Raster:
    """Take an array (H, W), (H, W, C) or (C, H, W), or one of ``planes`` such in a stack; of it the
    bands that ``reading`` asks for, in a ``box``."""
    if planes > 1 and array.ndim == 3 and not reading.slices.isdecimal():
        raise _unclear(array.shape, channels)
    number = choose_plane(reading, planes)
    stored = channels_last(array if planes == 1 else array[number], wanted(channels, reading))
    if box:
        stored = stored[box.top : box.top + box.height, box.left : box.left + box.width]
    if reading.bands:
        check_bands(reading, stored.shape[2])
        stored = stored[..., [band - 1 for band in reading.bands]]
    pixels = np.asarray(stored)
    missing = find_missing(pixels, reading)
    if isinstance(stored, np.ma.MaskedArray) and reading.nodata != "none":
        masked = np.ma.getmaskarray(stored)
        missing = masked if missing is None else masked | missing
        missing = missing if missing.any() else None
    return Raster(pixels, missing)


def channels_last(array: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) of one image; (H, W, C) if that and (C, H, W) both fit. For ALL channels they are
    the shorter one of these axes."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise BadImage(f"has shape {array.shape}, which is not an image")
    if channels == ALL:
        return array.transpose(1, 2, 0) if array.shape[0] < array.shape[2] else array
    for count in counts_for(channels):
        if array.shape[2] == count:
            return array
        if array.shape[0] == count:
            return array.transpose(1, 2, 0)
    raise OtherChannels(min(array.shape[0], array.shape[2]), channels)


def _unclear(shape: tuple[int, ...], channels: int) -> OtherChannels:
    """Refusal of an array of three axes of which none are the channels."""
    more = "; if they are planes of a stack, --data.slices takes one, or all as images"
    return OtherChannels(min(shape[0], shape[2]), channels, more if shape[0] <= shape[2] else "")
