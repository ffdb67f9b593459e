"""Colours of TIFF images: how values as stored become gray, RGB, or bands."""

from typing import Any

import numpy as np

from ssl_vit.data.raster import BadImage, Raster

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
REFUSED = {
    8: "CIELab colours",
    9: "ICCLab colours",
    10: "ITULab colours",
    32803: "the raw data of a camera",
    32844: "LogL luminance",
    32845: "LogLuv colours",
    34892: "the raw data of a camera",
}
_ALPHA = ((1,), (2,))  # associated and unassociated


def colour_count(page: Any, bands: int, channels: int) -> int:
    """Channels of an image after its colours are converted."""
    if page.photometric == PALETTE:
        return 3
    if channels in (1, 3):
        if page.photometric == CMYK and bands in (4, 5):
            return 3
        if tuple(page.extrasamples) in _ALPHA:
            plain = {RGB: 3, YCBCR: 3, WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1}
            return plain.get(page.photometric, bands)
    return bands


def coloured(stored: np.ndarray, missing: np.ndarray | None, page: Any, channels: int) -> Raster:
    """Convert the values as stored to black-is-zero gray, RGB, or bands."""
    if page.photometric == PALETTE:
        return Raster(_from_palette(stored[..., 0], page), _of_any(missing, 1))
    bits = page.bitspersample
    if page.photometric == WHITE_IS_ZERO:
        stored = inverted(stored, bits, stored.shape[2] - len(page.extrasamples))
    count = colour_count(page, stored.shape[2], channels)
    if page.photometric == CMYK and count == 3:
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
    # Some writers have put 8 bits where 16 belong; libtiff recognises it in the same way.
    palette = palette if palette.max() < 256 else palette >> 8
    return palette.astype(np.uint8).T[index.astype(np.intp)]


def _from_cmyk(stored: np.ndarray) -> np.ndarray:
    """RGB of the first four bands: (1 - ink) (1 - black), as by Pillow."""
    whole = stored.dtype.kind in "iu"
    top = float(np.iinfo(stored.dtype).max) if whole else 1.0
    inks = stored[..., :4].astype(np.float64)
    rgb = (top - inks[..., :3]) * (top - inks[..., 3:]) / top
    return np.rint(rgb).astype(stored.dtype) if whole else rgb
