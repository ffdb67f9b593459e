"""DICOM images, by pydicom: any transfer syntax that a decoder is installed for.

Gray values are shown as a viewer does (PS3.3 C.11): stored values, to the units of the modality
(rescale slope and intercept, or a table), to a window or VOI table, to white: 0 is black, also in
MONOCHROME1. Of up to 8 stored bits the result has 8; of up to 16 it is float32 in 0..1. Without a
window these are the ends of what the stored bits can hold, so that equal values look alike in all
files. Deeper values without a window are left in their units, as are those of other formats.
Palettes and YBR become RGB. Overlays and ICC profiles are not applied.
"""

import logging
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_rescale, as_pixel_options, get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from ssl_vit.common.config import ReadConfig
from ssl_vit.data.headers import coded_size
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
_UNDEFINED = 0xFFFFFFFF
_ITEM, _NO_MORE = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
# Of an enhanced file each frame has its own; pydicom applies those of the whole file only.
_OF_FRAMES = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def read_dicom(stream: Any, channels: int, reading: ReadConfig) -> Raster:
    """Read the frame of a DICOM file that ``reading`` asks for.

    Raises:
        BadImage: no pixels, truncated, too large, without that frame, or no decoder for it.
    """
    header = _header(stream)
    number = choose_plane(reading, _frames(header))
    stored = _stored(stream, header, number)
    if stored.ndim == 3:
        return Raster(_scaled(stored, header), find_missing(stored, reading))
    if header.PhotometricInterpretation == "PALETTE COLOR":
        missing = find_missing(stored, reading)
        rgb = _by_level(stored, lambda levels: _from_palette(levels, header))
        rgb = rgb[..., :3] if channels in (1, 3) else rgb
        wide = None if missing is None else np.repeat(missing[..., None], rgb.shape[2], axis=2)
        return Raster(rgb, wide)
    _take_from_frame(header, number)
    missing = _missing(stored, header, reading)
    gray = _by_level(stored, lambda levels: _shown(levels, header, reading.window))
    return Raster(gray[..., None], None if missing is None else missing[..., None])


def count_frames(stream: Any) -> int:
    """Number of frames of a file, by its header."""
    tags: Any = ["NumberOfFrames"]
    return _frames(pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=tags))


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


# --- pixels as stored ---------------------------------------------------------------------------


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
        _check_complete(stream, found, options, number)
        stream.seek(found.at)
        options |= {"pixel_keyword": found.keyword, "pixel_vr": found.vr}
        options["transfer_syntax_uid"] = syntax
    try:
        pixels = decoder.as_array(stream if found else header, index=number, **options)[0]
    except RuntimeError as error:  # of all decoders, in several lines
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


def _check_complete(stream: Any, found: _Element, options: dict[str, Any], number: int) -> None:
    """Check that all of a frame is in the file and of a sane size, undecoded.

    Raises:
        BadImage: it is not.
    """
    size = stream.seek(0, os.SEEK_END)
    if found.length == _UNDEFINED:
        parts = _fragments(stream, found.at, size)
        frames = options["number_of_frames"]
        stream.seek(parts[number] if len(parts) == frames else parts[0])
        own = coded_size(stream.read(1 << 16))
        if own is not None and own != (options["rows"], options["columns"]):
            says = f"{options['rows']} x {options['columns']}"
            raise BadImage(f"damaged DICOM: a frame of {says} holds {own[0]} x {own[1]}")
        return
    bits = options["rows"] * options["columns"] * options["samples_per_pixel"]
    bits *= options["bits_allocated"]
    if options["photometric_interpretation"] == "YBR_FULL_422":
        bits = bits * 2 // 3
    if found.at + found.length > size or (number + 1) * bits > 8 * found.length:
        raise BadImage("truncated DICOM: its pixels are not all in it")


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


# --- values -------------------------------------------------------------------------------------


def _by_level(stored: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Convert pixels; where they are more than the values they may have, these are converted."""
    bits = 8 * stored.dtype.itemsize
    if stored.dtype.kind not in "iu" or bits > 16 or stored.size <= 2**bits:
        return convert(stored)
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    table = convert(np.arange(2**bits, dtype=unsigned).view(stored.dtype))
    return table[stored.view(unsigned)]


def _take_from_frame(header: Dataset, number: int) -> None:
    """Take what an enhanced file says of all of its frames, or of this one, for the whole file."""
    shared = header.get("SharedFunctionalGroupsSequence") or []
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*shared[:1], *own[number : number + 1]):
        for name in _OF_FRAMES:
            for item in (groups.get(name) or [])[:1]:
                header.update(item)


def _missing(stored: np.ndarray, header: Dataset, reading: ReadConfig) -> np.ndarray | None:
    """Pixels without data: padding, by a value or a range of values."""
    padding, limit = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    missing = find_missing(stored, reading, "" if padding is None else str(padding))
    if reading.nodata != "auto" or padding is None or limit is None:
        return missing
    least, most = sorted((int(padding), int(limit)))
    within = (stored >= least) & (stored <= most)
    return within if within.any() else None


def _shown(values: np.ndarray, header: Dataset, window: tuple[str, ...]) -> np.ndarray:
    """Shown values of stored ones: uint8, or float32 in 0..1, or in the units of the modality."""
    units, least, most = _in_units(values, header)
    lut = header.get("VOILUTSequence")
    given = window if len(window) == 2 else _window_of(header) if window == ("file",) else None
    if window == ("file",) and lut:
        units, least, most = _looked_up(units, lut[0], header)
    elif given is not None:
        units = _windowed(units, float(given[0]), float(given[1]), header)
        least, most = 0.0, 1.0
    elif values.dtype.kind == "f" or header.BitsStored > 16:
        whole = values.dtype.kind != "f" and header.PhotometricInterpretation == "MONOCHROME1"
        return np.asarray(least + most - units if whole else units, dtype=np.float32)
    shown = (units - least) / max(most - least, 1e-12)
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    if values.dtype.kind == "f" or header.BitsStored > 8:
        return shown.astype(np.float32)
    return np.rint(255 * shown).astype(np.uint8)


def _ends(header: Dataset) -> tuple[int, int]:
    """Least and largest value of the stored bits."""
    bits = int(header.BitsStored)
    if header.get("PixelRepresentation"):
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def _in_units(values: np.ndarray, header: Dataset) -> tuple[np.ndarray, float, float]:
    """Values in the units of the modality, float64, and the ends of what they may be."""
    if table := header.get("ModalityLUTSequence"):
        return _looked_up(values, table[0], header)
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    ends = np.array(_ends(header) if values.dtype.kind != "f" else (0, 0), dtype=np.float64)
    if slope is None or intercept is None:
        return values.astype(np.float64), *ends.tolist()
    least, most = sorted(apply_rescale(ends, header).tolist())
    return apply_rescale(values, header), least, most


def _looked_up(
    values: np.ndarray, item: Dataset, header: Dataset
) -> tuple[np.ndarray, float, float]:
    """Values by a table of DICOM, float64, and the ends of what it may hold.

    pydicom's own take no modality table of other than 8 and 16 bits, and no VOI table of 8 bits
    with more than 256 entries.
    """
    count, first, bits = item.LUTDescriptor
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if header.original_encoding[1] else ">"
        wide = len(data) >= 2 * (count or 1 << 16)
        data = np.frombuffer(data, f"{order}u2" if wide else "u1")
    table = np.atleast_1d(np.asarray(data, dtype=np.float64))[: count or 1 << 16]
    places = np.clip(values.astype(np.float64) - first, 0, len(table) - 1).astype(np.intp)
    return table[places], 0.0, float((1 << bits) - 1)


def _window_of(header: Dataset) -> tuple[float, float] | None:
    """Centre and width of the first window of a file; None without one."""
    found = [header.get(name) for name in ("WindowCenter", "WindowWidth")]
    first = [v[0] if isinstance(v, Sequence) and v else v for v in found]
    if first[0] is None or first[1] is None:
        return None
    center, width = map(float, first)
    if not width > 0:
        more = "--data.window full, or CENTER WIDTH, reads it"
        raise BadImage(f"has a window of width {width:g}; {more}")
    return center, width


def _windowed(units: np.ndarray, center: float, width: float, header: Dataset) -> np.ndarray:
    """Window of values by the function that the file names, to 0..1 (PS3.3 C.11.2.1.2 and .3)."""
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (units - center) / width, -700, 700)))
    if function == "LINEAR" and width >= 1:
        center, width = center - 0.5, width - 1
    if not width:
        return (units > center).astype(np.float64)
    return np.clip((units - center) / width + 0.5, 0, 1)


def _scaled(stored: np.ndarray, header: Dataset) -> np.ndarray:
    """Colours (H, W, C) of any depth: uint8, float32 in 0..1, or of more than 16 bits as stored."""
    bits = int(header.BitsStored)
    if bits == 8 or bits > 16 or stored.dtype.kind != "u":
        return stored
    if bits < 8:
        return np.rint(stored * (255 / ((1 << bits) - 1))).astype(np.uint8)
    return stored.astype(np.float32) / np.float32((1 << bits) - 1)


def _from_palette(index: np.ndarray, header: Dataset) -> np.ndarray:
    """RGB, uint8, of palette indices, (..., 3) or with opacity; the high bytes of 16 bits."""
    rgb = apply_color_lut(index, header)
    deep = rgb.dtype != np.uint8 and header.RedPaletteColorLookupTableDescriptor[2] > 8
    return (rgb >> 8 if deep else rgb).astype(np.uint8)
