"""Crops of an encoded image, from no more of its pixels than they need.

A JPEG keeps blocks of 8 x 8 pixels by their frequencies, and libjpeg can make a half, a quarter or
an eighth of each side of an image straight from the low ones. Where every crop of an image is much
larger than what is made of it, this is faithful: with at least ``GAP`` pixels left for one of the
crop, all values differ from those by full decoding by less than a gray level on average (signal to
noise: over 43 dB), and the edges of a crop's box move by at most a quarter of the crop's pixels.
"""

import io
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.data.augment import Cut, DrawnCrop, ViewSpec, cut_views, draw_views, take_views
from ssl_vit.data.decode import MAX_PIXELS, decode, jpeg_size

GAP = 2
"""Pixels of the reduced image, at least, for one of a crop, each way. Pillow's thumbnails have
the same."""
# Half of each side is decoded hardly faster; it is resizing many crops that then takes less time.
_SEEN_OFTEN = 2
_SMALL = 1 << 18  # of so few pixels a reduced image is decoded no faster


def views_of(
    raw: bytes | bytearray | np.ndarray, channels: int, spec: ViewSpec, key: int
) -> list[list[DrawnCrop]]:
    """For each kind of crop its crops of one image; all that is drawn follows from ``key``.

    The boxes are those of the whole image, however much of it is decoded.

    Raises:
        BadImage: the image cannot be decoded.
    """
    found = None if isinstance(raw, np.ndarray) else _reduced_views(raw, channels, spec, key)
    return found or take_views(decode(raw, channels), spec, random.Random(key))


def _reduced_views(
    raw: bytes | bytearray, channels: int, spec: ViewSpec, key: int
) -> list[list[DrawnCrop]] | None:
    """The crops from a reduced image; None where none is faithful, or would be had sooner."""
    size = jpeg_size(raw) if raw[:2] == b"\xff\xd8" and channels in (1, 3) else None
    if size is None or not _worth_a_look(*size, spec):
        return None
    drawn = draw_views(*size, spec, random.Random(key), policies=True)
    by = reduction(spec, drawn)
    area = sum(cut.box[2] * cut.box[3] for cuts in drawn for cut in cuts)
    if by == 1 or (by == 2 and area < _SEEN_OFTEN * size[0] * size[1]):
        return None
    image = decode_reduced(raw, channels, size, by)
    if image is None:
        return None
    return cut_views(image, spec, [[_shrunk(cut, by) for cut in cuts] for cuts in drawn])


def _worth_a_look(height: int, width: int, spec: ViewSpec) -> bool:
    """Whether crops of so large an image may be, before they are drawn; for most it ends here."""
    return _SMALL < height * width <= MAX_PIXELS and all(
        height >= 2 * GAP * crop.size[0] and width >= 2 * GAP * crop.size[1] for crop in spec.crops
    )


def reduction(spec: ViewSpec, drawn: list[list[Cut]]) -> int:
    """The largest of 1, 2, 4, 8 by which an image may be reduced for these crops."""
    room = min(
        min(cut.box[2] / crop.size[0], cut.box[3] / crop.size[1])
        for crop, cuts in zip(spec.crops, drawn, strict=True)
        for cut in cuts
    )
    return max([1, *(by for by in (2, 4, 8) if room >= GAP * by)])


def decode_reduced(
    raw: bytes | bytearray, channels: int, size: tuple[int, int], by: int
) -> Tensor | None:
    """A JPEG of this (height, width) as uint8 (channels, H, W), each side divided and rounded up.

    ``channels``: 1 or 3. ``by``: 2, 4 or 8. None where only ``decode`` can tell what the image is,
    or what is wrong with it.
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
    except Exception:  # decoders raise nearly anything
        return None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _shrunk(cut: Cut, by: int) -> Cut:
    """The same crop of the reduced image, its edges at the nearest whole pixels."""
    top, left, height, width = cut.box
    up, at = round(top / by), round(left / by)
    down, right = round((top + height) / by), round((left + width) / by)
    return cut._replace(box=(up, at, down - up, right - at))
