"""Values of DICOM images: from stored ones to those that a viewer shows (PS3.3 C.11).

Gray: to the units of the modality (rescale slope and intercept, or a table), to a window or VOI
table, to white: 0 is black, also in MONOCHROME1. Of up to 8 stored bits the result has 8; of up to
16 it is float32 in 0..1. Without a window 0 and 1 are the ends of what the stored bits can hold, so
that equal values look alike in all files. Deeper values without a window are left in their units,
as are those of other formats. Palettes become RGB. Overlays and ICC profiles are not applied.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_rescale

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.raster import BadImage, find_missing

# Of an enhanced file each frame has its own; pydicom applies those of the whole file only.
_OF_FRAMES = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def by_level(stored: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Convert pixels; where they are more than the values they span, these are converted."""
    if stored.dtype.kind not in "iu":
        return convert(stored)
    low, high = int(stored.min()), int(stored.max())
    if high - low >= stored.size:
        return convert(stored)
    table = convert(np.arange(low, high + 1).astype(stored.dtype))
    return table[stored.astype(np.intp) - low]


def take_from_frame(header: Dataset, number: int) -> None:
    """Take what an enhanced file says of all of its frames, or of this one, for the whole file."""
    shared = header.get("SharedFunctionalGroupsSequence") or []
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*shared[:1], *own[number : number + 1]):
        for name in _OF_FRAMES:
            for item in (groups.get(name) or [])[:1]:
                header.update(item)


def padding(stored: np.ndarray, header: Dataset, reading: ReadConfig) -> np.ndarray | None:
    """Pixels without data: padding, by a value or a range of values."""
    names = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    value, limit = (_as_stored(header.get(name), stored.dtype) for name in names)
    missing = find_missing(stored, reading, "" if value is None else str(value))
    if reading.nodata != "auto" or value is None or limit is None:
        return missing
    least, most = sorted((value, limit))
    within = (stored >= least) & (stored <= most)
    return within if within.any() else None


def _as_stored(value: int | None, kind: np.dtype) -> Any:
    """A value in the header as pixels have it: some files write that of signed pixels as the
    unsigned number of the same bits."""
    return value if value is None or kind.kind not in "iu" else int(np.array(value).astype(kind))


def shown(values: np.ndarray, header: Dataset, window: tuple[str, ...]) -> np.ndarray:
    """Shown values of stored ones: uint8, or float32 in 0..1, or in the units of the modality."""
    units, least, most = _in_units(values, header)
    tables = header.get("VOILUTSequence") if window == ("file",) else None
    given = None if tables else _window_of(header, window)
    if tables:
        units, least, most = _looked_up(units, tables[0], header)
    elif given is not None:
        units, least, most = _windowed(units, *given, header), 0.0, 1.0
    elif values.dtype.kind == "f" or header.BitsStored > 16:
        whole = values.dtype.kind != "f" and header.PhotometricInterpretation == "MONOCHROME1"
        return np.asarray(least + most - units if whole else units, dtype=np.float32)
    gray = (units - least) / max(most - least, 1e-12)
    if header.PhotometricInterpretation == "MONOCHROME1":  # also where a presentation LUT says so
        gray = 1 - gray
    if values.dtype.kind == "f" or header.BitsStored > 8:
        return gray.astype(np.float32)
    return np.rint(255 * gray).astype(np.uint8)


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


def _window_of(header: Dataset, window: tuple[str, ...]) -> tuple[float, float] | None:
    """Centre and width that ``window`` gives, or of the first window of the file; None without."""
    if len(window) == 2:
        return float(window[0]), float(window[1])
    if window != ("file",):
        return None
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


def scaled(stored: np.ndarray, header: Dataset) -> np.ndarray:
    """Colours (H, W, C) of any depth: uint8, float32 in 0..1, or of more than 16 bits as stored."""
    bits = int(header.BitsStored)
    if bits > 16 or stored.dtype.kind != "u":
        return stored
    if bits == 8:
        return stored.astype(np.uint8, copy=False)
    if bits < 8:
        return np.rint(stored * (255 / ((1 << bits) - 1))).astype(np.uint8)
    return stored.astype(np.float32) / np.float32((1 << bits) - 1)


def from_palette(index: np.ndarray, header: Dataset) -> np.ndarray:
    """RGB, uint8, of palette indices, (..., 3) or with opacity; the high bytes of 16 bits."""
    rgb = apply_color_lut(index, header)
    deep = rgb.dtype != np.uint8 and header.RedPaletteColorLookupTableDescriptor[2] > 8
    return (rgb >> 8 if deep else rgb).astype(np.uint8)
