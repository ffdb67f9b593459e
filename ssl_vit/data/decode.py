"""Image decoding: encoded bytes or arrays to tensors; any failure raises `BadImage`.

Values: 8-bit images stay uint8. Unsigned 16-bit images become float32 in [0, 1] by division by
65535, so that they keep their depth; 12-bit data in a 16-bit file then lies in [0, 1/16], which
the data statistics take care of. Floats and all other integers become float32 as they are; bool
becomes 0 and 255. Orientation tags (EXIF) are not applied, as in the reference pipelines.
16-bit colour PPM and gray-with-alpha PNG files are read at 8 bits.
"""

import io
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from ssl_vit.common.config import ReadConfig

MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs
# Listed, because Pillow's full list contains EPS, which runs Ghostscript on the file.
_PIL_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Pillow warns at half as many, without naming the image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Image.init()  # Pillow knows the formats only once its plugins are loaded
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow and JPEG


class BadImage(Exception):  # noqa: N818  # a finding about data, not a failure
    """Unreadable image: it cannot be read or decoded; the message is the reason."""


def decode(
    raw: bytes | bytearray | np.ndarray, channels: int, reading: ReadConfig | None = None
) -> torch.Tensor:
    """Decode an image to (channels, H, W), uint8, or float32 for deeper data.

    `reading`: which plane of several, and which pixels are without data, if not as by default.

    With 3 channels gray is repeated, and alpha, palette and CMYK become RGB. With 1 channel RGB
    becomes luminance. Any other count must be the image's own; an array may be (H, W), (H, W, C)
    or (C, H, W); if both of the latter fit, (H, W, C) is used. The tensor owns its memory.

    Raises:
        BadImage: truncated, corrupt, empty, too large, not an image, or another channel count.
    """
    try:
        array = raw if isinstance(raw, np.ndarray) else _read(raw, channels)
        if isinstance(array, torch.Tensor):
            return array
        return torch.from_numpy(_to_chw(_to_number(array), channels))
    except BadImage:
        raise
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, zlib.error
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _read(raw: bytes | bytearray, channels: int) -> np.ndarray | torch.Tensor:
    """Decode by the file's first bytes, independent of its name and extension."""
    if not raw:
        raise BadImage("is empty (0 bytes)")
    if raw[:2] == b"\xff\xd8":
        return _read_jpeg(raw, channels)
    if raw[:6] == b"\x93NUMPY":
        return np.load(io.BytesIO(raw), allow_pickle=False)
    if raw[:4] in _TIFF_MAGIC:
        return _read_tiff(raw, channels)
    if raw[:8] == b"\x89PNG\r\n\x1a\n" and len(raw) > 25 and raw[24] == 16 and raw[25] in (2, 6):
        return _read_deep_png(raw, channels)
    return _read_pil(raw, channels)


def _read_jpeg(raw: bytes | bytearray, channels: int) -> np.ndarray | torch.Tensor:
    size = jpeg_size(raw)
    if channels not in (1, 3) or size is None:
        return _read_pil(raw, channels)
    _check_pixels(size[0] * size[1])
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    buffer = raw if isinstance(raw, bytearray) else bytearray(raw)  # torch wants it writable
    try:
        return decode_jpeg(torch.frombuffer(buffer, dtype=torch.uint8), mode=mode)
    except RuntimeError as error:
        if "truncated" in str(error):
            raise BadImage("truncated JPEG") from error
        return _read_pil(raw, channels)  # Pillow reads some that torchvision does not


def jpeg_size(raw: bytes | bytearray) -> tuple[int, int] | None:
    """JPEG size: height and width from the frame header; None if not found.

    torchvision allocates any size in the header, so it is checked first.
    """
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = raw[at + 5 : at + 7], raw[at + 7 : at + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        else:
            at += 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    return None


def _check_pixels(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise BadImage(f"has {pixels} values per channel, more than {MAX_PIXELS}: too large")


def _read_deep_png(raw: bytes | bytearray, channels: int) -> np.ndarray:
    """Read a 16-bit colour PNG at full depth; Pillow alone returns only the high bytes.

    With the other byte order it returns the low ones. torchvision would read both at once, but its
    PNG decoder (0.29) crashes the process on some damaged files.
    """
    halves = []
    for order in ("B", "L"):
        with Image.open(io.BytesIO(raw), formats=("PNG",)) as image:
            rawmode = f"{image.mode};16{order}"
            image.tile = [(*tile[:3], rawmode) for tile in image.tile]  # type: ignore[misc]
            image.load()
            halves.append(np.array(image).astype(np.uint16))
    array = halves[0] << 8 | halves[1]
    return array[..., :3] if channels in (1, 3) else array


def _read_pil(raw: bytes | bytearray, channels: int) -> np.ndarray:
    with Image.open(io.BytesIO(raw), formats=_PIL_FORMATS) as image:
        image.load()
        if image.mode == "I" and image.format in ("PNG", "PPM"):
            return np.asarray(image).astype(np.uint16)  # a 16-bit file; only TIFF has 32-bit ones
        return np.array(_to_mode(image, channels))


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to the colour mode with the wanted channels, where there is one."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return image
    if image.mode in ("P", "PA"):  # through RGBA, as transparency may be in the palette
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "1" or channels == 1:
        return image.convert("L")
    if channels == 3 or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image.convert("RGB")
    return image


def _read_tiff(raw: bytes | bytearray, channels: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise BadImage("a TIFF image needs `pip install tifffile`") from error
    with tifffile.TiffFile(io.BytesIO(raw)) as file:
        series = file.series[0]
        page = series.keyframe
        _check_pixels(int(np.prod(series.shape)) // max(channels, page.samplesperpixel))
        for part in series.pages:
            if part is not None:
                _check_tiff_page(part, len(raw))
        if len(series.pages) == 1 and _pil_keeps(page):
            return _read_pil(raw, channels)
        array = series.asarray()
        alpha = page.photometric == 2 and tuple(page.extrasamples) in ((1,), (2,))  # 2: RGB
        if alpha and channels in (1, 3) and array.ndim == 3:
            array = array[:3] if page.planarconfig == 2 else array[..., :3]
        return array


def _check_tiff_page(page: Any, size: int) -> None:
    """Check that all strips or tiles of a page are in the file, before decoding.

    tifffile detects most of this itself, but may search for seconds.
    """
    if len(page.dataoffsets) < int(np.prod(page.chunked)):
        raise BadImage("truncated TIFF: parts of it are not listed")
    ends = (at + count for at, count in zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends, default=0) > size:
        raise BadImage("truncated TIFF")


def _pil_keeps(page: Any) -> bool:
    """True if Pillow returns this page with full depth and all channels."""
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        return False
    samples, alpha = page.samplesperpixel, tuple(page.extrasamples) in ((1,), (2,))
    if page.dtype == np.uint8:
        cmyk = page.photometric == 5
        return samples in (1, 3) or (samples == 2 and alpha) or (samples == 4 and (alpha or cmyk))
    return samples == 1 and page.dtype in (np.bool_, np.uint16, np.int32, np.float32)


def _to_number(array: np.ndarray) -> np.ndarray:
    """Convert to uint8 or float32 by the rules in the module's docstring."""
    if array.size == 0:
        raise BadImage(f"is empty: an array of shape {array.shape}")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return array.astype(np.float32) / np.float32(65535)
    if array.dtype.kind not in "iuf":
        raise BadImage(f"holds {array.dtype} values, not numbers")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, refused below
        array = array.astype(np.float32)
    if np.isinf(array).any():
        raise BadImage("holds infinite values; --data.nodata inf takes them for missing ones")
    return array


def _to_chw(array: np.ndarray, channels: int) -> np.ndarray:
    """Convert (H, W), (H, W, C) or (C, H, W) to a new contiguous (channels, H, W)."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise BadImage(f"has shape {array.shape}, which is not an image")
    for count in (channels, *{1: (3,), 3: (1,)}.get(channels, ())):
        hwc = _channels_last(array, count)
        if hwc is None:
            continue
        if count == 3 and channels == 1:
            hwc = _luminance(hwc)
        hwc = np.broadcast_to(hwc, (*hwc.shape[:2], channels))
        return np.array(hwc.transpose(2, 0, 1), order="C")
    has = min(array.shape[0], array.shape[-1])
    raise BadImage(f"has {has} channel{'s' * (has != 1)}, --data.channels is {channels}")


def _channels_last(array: np.ndarray, count: int) -> np.ndarray | None:
    if array.shape[2] == count:
        return array
    return array.transpose(1, 2, 0) if array.shape[0] == count else None


def _luminance(rgb: np.ndarray) -> np.ndarray:
    gray = (rgb.astype(np.float32) @ _LUMINANCE)[..., None]
    return np.rint(gray).astype(np.uint8) if rgb.dtype == np.uint8 else gray
