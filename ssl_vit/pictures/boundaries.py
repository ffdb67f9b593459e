"""Boundary pictures: the outlines of true and predicted classes, drawn over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from torch import Tensor

from ssl_vit.common.figures import picture_rows
from ssl_vit.data.map_values import nearest_mask
from ssl_vit.data.pairs import PairImages, Pairs
from ssl_vit.data.view import View
from ssl_vit.pictures.thumbnails import as_rgb

_SIDE = 320
# Two colours that differ in lightness and with any colour blindness (Okabe and Ito 2008).
_TRUE, _PREDICTED = (86, 180, 233), (240, 228, 66)
_DARKER = 0.35
_CAPTION = (
    "Boundaries between classes, drawn over validation images: blue, the true ones; yellow, the "
    "predicted ones. Pixels without a true class are dark, and are not judged."
)


@dataclass(frozen=True)
class Outlined:
    """Image to draw: its index among the pairs, and the true (-1: none) and predicted classes of
    its pixels, (h, w)."""

    index: int
    truth: Integer[Tensor, "h w"]
    guess: Integer[Tensor, "h w"]


def evenly(n: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``n`` images, evenly spread, with the first one."""
    count = min(n, most)
    return [i * n // count for i in range(count)]


def boundaries(mask: Integer[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """True for pixels that differ from the one to the right or below, and for these two."""
    found = np.zeros(mask.shape, bool)
    across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    found[:, 1:] |= across
    found[:, :-1] |= across
    found[1:] |= down
    found[:-1] |= down
    return found


def outlined(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Integer[np.ndarray, "h w"],
    colour: tuple[int, int, int],
) -> UInt8[np.ndarray, "h w 3"]:
    """Image with the boundaries of a mask: a coloured line within a black one."""
    line = boundaries(mask)
    around = np.pad(line, 1)
    height, width = line.shape
    moved = [around[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    drawn = np.where(np.logical_or.reduce(moved)[..., None], 0, image)
    return np.where(line[..., None], colour, drawn).astype(np.uint8)


def boundaries_panel(
    pairs: Pairs, view: View, samples: Sequence[Outlined]
) -> UInt8[np.ndarray, "height width 3"]:
    """Boundary panel: each image, with its true, and with its predicted boundaries.

    Images keep their proportions, and have at most 320 pixels a side.
    """
    rows = [_row(pairs, view, sample) for sample in samples]
    height = max(cell.shape[0] for row in rows for cell in row)
    width = max(cell.shape[1] for row in rows for cell in row)
    titles = ("image", "true boundaries", "predicted boundaries")
    columns = {
        title: np.stack([_filled(row[i], height, width) for row in rows])
        for i, title in enumerate(titles)
    }
    return picture_rows(columns, _CAPTION)


def _row(pairs: Pairs, view: View, sample: Outlined) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Image, image with true, and image with predicted boundaries, of one sample."""
    # Small ones are enlarged, so that lines are thin beside what they bound.
    factor = _SIDE / max(sample.truth.shape)
    size = (
        max(1, round(sample.truth.shape[0] * factor)),
        max(1, round(sample.truth.shape[1] * factor)),
    )
    read = PairImages(pairs, size, view.channels).__getitems__([sample.index])
    image = as_rgb(read.views.crops[0], view)[0]
    truth, guess = (nearest_mask(m, size).numpy() for m in (sample.truth, sample.guess))
    shown = np.where(truth[..., None] < 0, image * _DARKER, image).astype(np.uint8)
    return [image, outlined(shown, truth, _TRUE), outlined(shown, guess, _PREDICTED)]


def _filled(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Image filled up with white at its lower right."""
    below, right = height - image.shape[0], width - image.shape[1]
    return np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=255)
