"""DICOM images, by pydicom: any transfer syntax that a decoder is installed for.

What is done with their values is described in ``dicom_values``. YBR becomes RGB.
"""

import logging
import os
import struct
import warnings
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.multival import MultiValue
from pydicom.pixels import as_pixel_options, get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.dicom_values import (
    by_level,
    from_palette,
    padding,
    scaled,
    shown,
    take_from_frame,
)
from ssl_vit.data.headers import coded_size, jpeg2000_header
from ssl_vit.data.raster import BadImage, Raster, check_pixels, choose_plane, find_missing, reason

# What they say of single files would stand between the lines of a run; what matters is a BadImage.
for _name in ("pydicom", "pylibjpeg", "openjpeg", "libjpeg"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="pydicom")
_PIXELS = {
    (0x7FE0, 0x0008): "FloatPixelData",
    (0x7FE0, 0x0009): "DoubleFloatPixelData",
    (0x7FE0, 0x0010): "PixelData",
}
_NEEDED = ("rows", "columns", "samples_per_pixel", "bits_allocated", "photometric_interpretation")
_FRAMES, _COLUMNS = 0x00280008, 0x00280011
_UNDEFINED = 0xFFFFFFFF
_ITEM = (0xFFFE, 0xE000)


def read_dicom(stream: Any, channels: int, reading: ReadConfig) -> Raster:
    """Read the frame of a DICOM file that ``reading`` asks for.

    Raises:
        BadImage: no pixels, truncated, too large, without that frame, or no decoder for it.
    """
    header = _header(stream)
    number = choose_plane(reading, _frames(header))
    stored = _stored(stream, header, number)
    if stored.ndim == 3:
        return Raster(scaled(stored, header), find_missing(stored, reading))
    if header.PhotometricInterpretation == "PALETTE COLOR":
        missing = find_missing(stored, reading)
        rgb = by_level(stored, lambda levels: from_palette(levels, header))
        rgb = rgb[..., :3] if channels in (1, 3) else rgb
        wide = None if missing is None else np.repeat(missing[..., None], rgb.shape[2], axis=2)
        return Raster(rgb, wide)
    take_from_frame(header, number)
    missing = padding(stored, header, reading)
    gray = by_level(stored, lambda levels: shown(levels, header, reading.window))
    return Raster(gray[..., None], None if missing is None else missing[..., None])


def count_frames(stream: Any) -> int:
    """Number of frames of a file, by the first part of its header."""
    return _frames(read_partial(stream, lambda tag, *_: tag > _FRAMES, force=True))


def read_element(stream: Any, tag: int) -> str:
    """Value of an element of a file as text, empty where it has none, by the part of its header up
    to there."""
    header = read_partial(stream, lambda found, *_: found > tag, force=True, specific_tags=[tag])
    value = header[tag].value if tag in header else None
    if isinstance(value, MultiValue):
        return "\\".join(map(str, value))
    return "" if value is None else str(value)


def frame_size(stream: Any) -> tuple[int, int]:
    """Height and width of the frames of a file, by the first part of its header."""
    header = read_partial(stream, lambda tag, *_: tag > _COLUMNS, force=True)
    return int(header.Rows), int(header.Columns)


def _frames(header: Dataset) -> int:
    try:
        return int(header.get("NumberOfFrames") or 1)
    except ValueError as error:
        raise BadImage("damaged DICOM: its number of frames is no number") from error


def _header(stream: Any) -> Dataset:
    """All before the pixels, with the transfer syntax also of a file that does not name it.

    The stream is then where they begin; of a file that is deflated as a whole they are in it.
    """
    try:
        header = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
    except Exception as error:  # of a file that is cut, of all kinds
        raise BadImage(f"damaged DICOM: its header ends too early ({reason(error)})") from error
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        stream.seek(0)
        return pydicom.dcmread(stream, force=True)
    if syntax is None:
        implicit, little = header.original_encoding
        kind = "1.2.840.10008.1.2" + ("" if implicit else ".1" if little else ".2")
        header.file_meta.TransferSyntaxUID = UID(kind)
    return header


class _Element(NamedTuple):
    """Pixel data in a file: which of three elements, its VR, first byte and length."""

    keyword: str
    vr: str
    at: int
    length: int


def _stored(stream: Any, header: Dataset, number: int) -> np.ndarray:
    """Pixels of a frame as stored: (H, W), or (H, W, C) in RGB."""
    syntax = header.file_meta.TransferSyntaxUID
    found = None
    if syntax != DeflatedExplicitVRLittleEndian:
        found = _find_pixels(stream, header)
    elif not any(keyword in header for keyword in _PIXELS.values()):
        raise _no_pixels(header)
    options = as_pixel_options(header, view_only=True)
    if lacking := [name for name in _NEEDED if name not in options]:
        raise BadImage(f"damaged DICOM: it does not say its {lacking[0].replace('_', ' ')}")
    check_pixels(options["rows"] * options["columns"])
    decoder = _decoder(syntax)
    if found is not None:
        _check_complete(stream, found, options, number, decoder.is_encapsulated)
        stream.seek(found.at)
        options |= {"pixel_keyword": found.keyword, "pixel_vr": found.vr}
        options["transfer_syntax_uid"] = syntax
    try:
        pixels = decoder.as_array(stream if found else header, index=number, **options)[0]
    except Exception as error:  # of all decoders, in several lines
        raise BadImage(f"damaged DICOM ({syntax.name}): {' '.join(str(error).split())}") from error
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _decoder(syntax: UID) -> Any:
    """Decoder of a transfer syntax.

    Raises:
        BadImage: there is none, or it is not installed.
    """
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise BadImage(f"is a DICOM in {syntax.name}, which is not decoded") from error
    if not decoder.is_available:
        need = "its decoder is missing: pip install 'ssl_vit[dicom]'"
        raise BadImage(f"is a DICOM in {syntax.name}; {need}")
    return decoder


def _find_pixels(stream: Any, header: Dataset) -> _Element:
    """Pixel data that begin where the header ends.

    Raises:
        BadImage: there are none.
    """
    order = "<" if header.original_encoding[1] else ">"
    head = stream.read(8)
    keyword = _PIXELS.get(struct.unpack(order + "HH", head[:4])) if len(head) == 8 else None
    if keyword is None:
        raise _no_pixels(header)
    # Some files are not in the encoding that they name. Implicit lengths are even, and no such VR.
    explicit = head[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN")
    vr = head[4:6].decode() if explicit else "OW"
    length = stream.read(4) if explicit else head[4:]
    if len(length) < 4:
        raise BadImage("truncated DICOM")
    return _Element(keyword, vr, stream.tell(), struct.unpack(order + "I", length)[0])


def _no_pixels(header: Dataset) -> BadImage:
    """Refusal of a file without pixels, as what it says that it is."""
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    name = UID(str(kind)).name if kind else "a DICOM that does not say of what kind"
    image = "Rows" in header or "Image Storage" in name or name == kind  # or of a private kind
    return BadImage(f"holds no pixels{', or was cut before them' if image else ''}: {name}")


def _check_complete(
    stream: Any, found: _Element, options: dict[str, Any], number: int, compressed: bool
) -> None:
    """Check that all of a frame is in the file and of a sane size, undecoded.

    Raises:
        BadImage: it is not.
    """
    size = stream.seek(0, os.SEEK_END)
    if compressed:
        parts = _fragments(stream, found.at, size)
        frames = options["number_of_frames"]
        stream.seek(parts[number] if len(parts) == frames else parts[0])
        _check_frame(stream.read(1 << 16), options)
        return
    bits = options["rows"] * options["columns"] * options["samples_per_pixel"]
    bits *= options["bits_allocated"]
    if options["photometric_interpretation"] == "YBR_FULL_422":
        bits = bits * 2 // 3
    length = size - found.at if found.length == _UNDEFINED else found.length
    if found.at + length > size or (number + 1) * bits > 8 * length:
        raise BadImage("truncated DICOM: its pixels are not all in it")


def _check_frame(head: bytes, options: dict[str, Any]) -> None:
    """Check that a compressed frame is of the size that the file says."""
    own, says = coded_size(head), (options["rows"], options["columns"])
    if own is not None and own != says:
        sizes = f"{says[0]} x {says[1]} holds {own[0]} x {own[1]}"
        raise BadImage(f"damaged DICOM: a frame of {sizes}")
    bands = options["samples_per_pixel"]
    if (found := jpeg2000_header(head)) is not None and found[2] > bands + 1:
        raise BadImage(f"damaged DICOM: a frame of {bands} channels holds {found[2]}")


def _fragments(stream: Any, at: int, size: int) -> list[int]:
    """First bytes of the parts of compressed pixels, but for the table of offsets before them."""
    parts = []
    while at + 8 <= size:
        stream.seek(at)
        *tag, length = struct.unpack("<HHI", stream.read(8))
        if tuple(tag) != _ITEM:
            break
        if at + 8 + length > size:
            raise BadImage("truncated DICOM: its pixels are not all in it")
        parts.append(at + 8)
        at += 8 + length
    if len(parts) < 2:
        raise BadImage("truncated DICOM: its pixels are not all in it")
    return parts[1:]
