"""Decoders of photographs: all formats but TIFF and NPY. Any failure is an exception.

Orientation tags (EXIF) are not applied, as in the reference pipelines. AVIF and HEIC of 10 and 12
bits are read at 8, as photographs. Of an animation the first frame is read, unless another is
asked for: as images with one frame always were.
"""

import io
import re
import warnings

import numpy as np
from PIL import Image

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.headers import coded_size, jpeg2000_header, jpeg_frame
from ssl_vit.data.raster import BadImage, Raster, check_pixels, choose_plane, find_missing

# Pillow warns at half as many pixels as it refuses, without naming the image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Image.init()  # Pillow knows the formats only once its plugins are loaded
# Listed, because Pillow's full list contains EPS, which runs Ghostscript on the file.
_PIL_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM")
_DEEP_PPM = re.compile(rb"P([36])" + 3 * rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)" + rb"\s")
# Chunks of a PNG that are not critical to it but are read here: transparency, and animation.
_WANTED_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
_HEIF_HINT = "a HEIC image needs: pip install 'ssl_vit[heif]' (or pillow-heif)"


def other_jpeg(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    """Read a JPEG that torchvision does not: by Pillow, or imagecodecs (12 and 16 bits)."""
    at = jpeg_frame(raw)
    if at is None or (raw[at + 1] != 0xC3 and raw[at + 4] == 8):  # C3: lossless
        return read_pil(raw, "JPEG", channels, reading)
    import imagecodecs

    _check_size(raw)
    if raw.find(b"\xff\xd9", at) < 0:  # the end mark, which this decoder does not ask for
        raise BadImage("truncated JPEG")
    return _with_missing(_bands(imagecodecs.jpeg8_decode(bytes(raw))), reading)


def nodata_given(reading: ReadConfig) -> bool:
    """True if a number is given for missing values: pixels are then needed as they are stored."""
    return reading.nodata not in ("auto", "none")


def _check_size(raw: bytes | bytearray) -> None:
    size = coded_size(raw)
    if size is None:
        raise BadImage("truncated: its header does not say how large it is")
    check_pixels(size[0] * size[1])


def _bands(array: np.ndarray) -> np.ndarray:
    """(H, W, C) of what a decoder returns: that, or (H, W)."""
    return array[..., None] if array.ndim == 2 else array


def _with_missing(pixels: np.ndarray, reading: ReadConfig) -> Raster:
    return Raster(pixels, find_missing(pixels, reading))


def _drop_alpha(raster: Raster, channels: int) -> Raster:
    """Raster without the opacity behind gray or colour, where gray or colour is asked for."""
    colours = {2: 1, 4: 3}.get(raster.pixels.shape[2])
    if channels not in (1, 3) or colours is None:
        return raster
    missing = None if raster.missing is None else raster.missing[..., :colours]
    return Raster(raster.pixels[..., :colours], missing)


def read_png(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    """Read a PNG; 16 bits with colour or opacity by imagecodecs, as Pillow returns 8 of them."""
    try:
        return _read_png(raw, channels, reading)
    except ValueError:  # Pillow's limits of text and profiles, which are not needed
        return _read_png(_bare_png(raw), channels, reading)


def _read_png(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    deep = len(raw) > 25 and raw[24] == 16 and raw[25] in (2, 4, 6)
    if not deep or (b"acTL" in raw[:4096] and reading.slices.isdecimal()):
        return read_pil(raw, "PNG", channels, reading)
    import imagecodecs

    choose_plane(reading, 1)
    _check_size(raw)
    return _drop_alpha(_with_missing(_bands(imagecodecs.png_decode(bytes(raw))), reading), channels)


def _bare_png(raw: bytes | bytearray) -> bytes:
    """A PNG without the chunks that do not change its pixels."""
    view, at, kept = memoryview(raw), 8, [bytes(raw[:8])]
    while at + 12 <= len(view):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        name = bytes(view[at + 4 : at + 8])
        if not name[0] & 0x20 or name in _WANTED_CHUNKS:  # the bit of ancillary chunks
            kept.append(bytes(view[at:end]))
        at = end
    return b"".join(kept)


def read_ppm(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    """Read a PBM, PGM, PPM or PFM; colour of more than 8 bits here, as Pillow returns 8 of them.

    As by Pillow for gray, its values are scaled so that the largest that it may have is white.
    """
    found = _DEEP_PPM.match(raw)
    if found is None or not 255 < int(found[4]) < 65536:
        return read_pil(raw, "PPM", channels, reading)
    choose_plane(reading, 1)
    width, height, most = int(found[2]), int(found[3]), int(found[4])
    check_pixels(width * height)
    count = 3 * width * height
    if found[1] == b"6":
        stored = np.frombuffer(raw, ">u2", count, found.end()).astype(np.uint16)
    else:
        stored = np.array(raw[found.end() :].split()[:count], dtype=np.uint16)
    stored = stored.reshape(height, width, 3)
    scaled = np.rint(stored * (65535 / most)).astype(np.uint16) if most < 65535 else stored
    return Raster(scaled, find_missing(stored, reading))


def read_jpeg2000(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    """Read a JPEG 2000; Pillow has its palettes and colour spaces, imagecodecs all depths."""
    header = jpeg2000_header(raw)
    if header is None:
        raise BadImage("truncated JPEG 2000: its header is not complete")
    height, width, components, bits, signed = header
    check_pixels(height * width)
    if bits <= 8 and components <= 4 and not signed:
        return read_pil(raw, "JPEG2000", channels, reading)
    import imagecodecs

    choose_plane(reading, 1)
    check_pixels(height * width * components // max(channels, 4))
    pixels = _bands(imagecodecs.jpeg2k_decode(bytes(raw), numthreads=1))
    return _drop_alpha(_with_missing(pixels, reading), channels)


def read_jpegxl(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    """Read a JPEG XL of any depth; of an animation the first frame."""
    import imagecodecs

    _check_size(raw)
    pixels = imagecodecs.jpegxl_decode(bytes(raw), index=0, numthreads=1)
    choose_plane(reading, 1)
    return _drop_alpha(_with_missing(_bands(pixels), reading), channels)


def read_heif(raw: bytes | bytearray, channels: int, reading: ReadConfig) -> Raster:
    """Read a HEIC or HEIF by pillow-heif, an optional library."""
    try:
        import pillow_heif
    except ImportError as error:
        raise BadImage(_HEIF_HINT) from error
    file = pillow_heif.open_heif(io.BytesIO(raw), convert_hdr_to_8bit=True)
    chosen = file[choose_plane(reading, len(file)) if reading.slices.isdecimal() else 0]
    check_pixels(chosen.size[0] * chosen.size[1])
    return _from_pil(chosen.to_pillow(), channels, reading)


def read_pil(raw: bytes | bytearray, kind: str, channels: int, reading: ReadConfig) -> Raster:
    """Read an image by Pillow; ``kind``: its name of the format, empty if unknown."""
    formats = (kind,) if kind else _PIL_FORMATS
    with Image.open(io.BytesIO(raw), formats=formats) as image:
        check_pixels(image.width * image.height)
        frames = getattr(image, "n_frames", 1) if reading.slices.isdecimal() else 1
        if (frame := choose_plane(reading, frames)) and frames > 1:
            image.seek(frame)
        image.load()
        # Pillow multiplies gray of 2 and 4 bits in a PNG, to 0..255.
        few = kind == "PNG" and raw[25] == 0 and raw[24] in (2, 4)
        return _from_pil(image, channels, reading, 255 // (2 ** raw[24] - 1) if few else 1)


def _from_pil(image: Image.Image, channels: int, reading: ReadConfig, scale: int = 1) -> Raster:
    """Pixels in the wanted colour mode; those without data by the values before, over ``scale``."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return _with_missing(_bands(np.asarray(image).astype(np.uint16)), reading)  # a 16-bit file
    pixels = _bands(np.asarray(_to_mode(image, channels)))
    if not nodata_given(reading):
        return _with_missing(pixels, reading) if pixels.dtype.kind == "f" else Raster(pixels)
    stored = _bands(np.asarray(image))
    if image.mode in ("LA", "PA", "RGBA") and pixels.shape[2] < stored.shape[2]:
        stored = stored[..., :-1]
    missing = find_missing(stored // scale if scale > 1 else stored, reading)
    if missing is not None and missing.shape[2] != pixels.shape[2]:
        lost = np.logical_or.reduce(missing, axis=2, keepdims=True)
        missing = np.repeat(lost, pixels.shape[2], axis=2)
    return Raster(pixels, missing)


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to the colour mode with the wanted channels, where there is one."""
    if image.mode == "L" and channels in (1, 3):
        return image  # gray is repeated later
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return image
    if image.mode in ("P", "PA"):  # through RGBA, as transparency may be in the palette
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "1" or channels == 1:
        return image.convert("L")
    if channels == 3 or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image if image.mode == "RGB" else image.convert("RGB")
    return image
