"""Reduced decoding: crops of a JPEG decoded at a fraction of its size.

A JPEG stores blocks of 8 x 8 pixels by their frequencies, and libjpeg can decode a half, a quarter
or an eighth of each side directly from the low ones. Where every crop of an image is much larger
than its output, this is accurate: with at least ``GAP`` pixels left for one of the
crop, all values differ from those by full decoding by less than a gray level on average (signal to
noise: over 43 dB), and the edges of a crop's box move by at most a quarter of the crop's pixels.
"""

import io
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.augment import Cut, DrawnCrop, ViewSpec, cut_views, draw_views, take_views
from ssl_vit.data.cache import ImageCache
from ssl_vit.data.decode import MAX_PIXELS, decode
from ssl_vit.data.headers import jpeg_size
from ssl_vit.data.stills import nodata_given

Raw = bytes | bytearray | np.ndarray
Keep = Callable[[Raw, str, Callable[[], Tensor | None]], Tensor | None]

GAP = 2
"""Minimum pixels of the reduced image per output pixel and direction, as in Pillow's thumbnails."""
# Half size decodes hardly faster; the gain is in resizing many crops.
_SEEN_OFTEN = 2
_SMALL = 1 << 18  # below this many pixels reduced decoding is not faster


def views_of(
    raw: Raw,
    channels: int,
    spec: ViewSpec,
    key: int,
    reading: ReadConfig | None = None,
    cache: ImageCache | None = None,
) -> list[list[DrawnCrop]]:
    """Crops of one image, by kind of crop; all random numbers follow from ``key``.

    The boxes are those of the whole image, independent of the reduction. Each of its reductions is
    an image of its own for ``cache``, so that crops are the same with it and without.

    Raises:
        BadImage: the image cannot be decoded, or holds no data.
    """
    reading = reading or ReadConfig()
    keep = cache.image if cache else _decoded
    special = nodata_given(reading) or reading.slices.isdecimal() or reading.bands or reading.level
    if not special:
        found = _reduced_views(raw, channels, spec, key, keep)
        if found:
            return found
    how = f"{channels} channels, {reading.decoding}"
    image = keep(raw, how, lambda: decode(raw, channels, reading))
    assert image is not None  # decode raises an error instead
    return take_views(image, spec, random.Random(key))


def _decoded(raw: Raw, how: str, decode: Callable[[], Tensor | None]) -> Tensor | None:
    """Decoded image, as of ``ImageCache.image`` but without a cache."""
    return decode()


def _reduced_views(
    raw: Raw, channels: int, spec: ViewSpec, key: int, keep: Keep
) -> list[list[DrawnCrop]] | None:
    """Crops from a reduced image; None where that is inaccurate or not faster."""
    if isinstance(raw, np.ndarray) or raw[:2] != b"\xff\xd8" or channels not in (1, 3):
        return None
    size = jpeg_size(raw)
    if size is None or not _worth_a_look(*size, spec):
        return None
    drawn = draw_views(*size, spec, random.Random(key), policies=True)
    by = reduction(spec, drawn)
    area = sum(cut.box[2] * cut.box[3] for cuts in drawn for cut in cuts)
    if by == 1 or (by == 2 and area < _SEEN_OFTEN * size[0] * size[1]):
        return None
    how = f"{channels} channels, reduced by {by}"
    image = keep(raw, how, lambda: decode_reduced(raw, channels, size, by))
    if image is None:
        return None
    return cut_views(image, spec, [[_shrunk(cut, by) for cut in cuts] for cuts in drawn])


def _worth_a_look(height: int, width: int, spec: ViewSpec) -> bool:
    """True if reduction is possible for this image size, before crops are drawn."""
    return _SMALL < height * width <= MAX_PIXELS and all(
        height >= 2 * GAP * crop.size[0] and width >= 2 * GAP * crop.size[1] for crop in spec.crops
    )


def reduction(spec: ViewSpec, drawn: list[list[Cut]]) -> int:
    """Reduction factor, the largest of 1, 2, 4, 8 that these crops allow."""
    room = min(
        min(side / needed for side, needed in zip(cut.box[2:], cut.size(crop), strict=True))
        for crop, cuts in zip(spec.crops, drawn, strict=True)
        for cut in cuts
    )
    return max([1, *(by for by in (2, 4, 8) if room >= GAP * by)])


def decode_reduced(
    raw: bytes | bytearray, channels: int, size: tuple[int, int], by: int
) -> Tensor | None:
    """Decode a JPEG of this (height, width) to uint8 (channels, H, W), sides divided, rounded up.

    ``channels``: 1 or 3. ``by``: 2, 4 or 8. None where ``decode`` is needed, also for damaged
    images.
    """
    height, width = size
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(io.BytesIO(raw), formats=("JPEG",)) as image:
            if image.size != (width, height) or image.mode not in ("L", "RGB"):
                return None
            image.draft(mode, (width // by, height // by))
            if image.size != (-(-width // by), -(-height // by)):
                return None
            pixels = np.array(image.convert(mode))
    except Exception:  # decoders raise all kinds
        return None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _shrunk(cut: Cut, by: int) -> Cut:
    """Crop box in the reduced image, edges rounded to whole pixels."""
    top, left, height, width = cut.box
    up, at = round(top / by), round(left / by)
    down, right = round((top + height) / by), round((left + width) / by)
    return cut._replace(box=(up, at, down - up, right - at))
