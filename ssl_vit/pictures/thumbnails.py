"""Thumbnails: images of a source as small central crops in RGB."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from ssl_vit.common.figures import to_rgb
from ssl_vit.data.base import Source
from ssl_vit.data.eval_images import EvalImages
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.view import View

# Fills unreadable images, and the margins of images that are not square.
_GRAY = 128


def as_rgb(images: Tensor, view: View) -> UInt8[np.ndarray, "b h w 3"]:
    """Convert images (b, c, h, w) as read, uint8 or deeper, to RGB."""
    standardised = Normalize(view.mean, view.std).images(images)
    return to_rgb(view.display(images).inverse(standardised))


def squared(pictures: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n s s 3"]:
    """Pad pictures to squares with gray margins."""
    height, width = pictures.shape[1:3]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    around = ((0, 0), (top, side - height - top), (left, side - width - left), (0, 0))
    return np.pad(pictures, around, constant_values=_GRAY)


def thumbnails(
    source: Source, places: Sequence[int], view: View, side: int
) -> UInt8[np.ndarray, "n h w 3"]:
    """Thumbnails of the images at these indices, prepared by ``view``, in that order.

    The longer side has at most ``side`` pixels. An unreadable image is plain gray.
    """
    factor = min(1.0, side / max(view.size))
    height, width = (max(1, round(pixels * factor)) for pixels in view.size)
    images = EvalImages(source, (height, width), view.crop_ratio, view.channels)
    made = np.full((len(places), height, width, 3), _GRAY, np.uint8)
    for row, place in enumerate(places):
        read = images.__getitems__([int(place)]).views.crops
        if read:
            made[row] = as_rgb(read[0], view)[0]
    return made
