"""Large-scale jitter (Ghiasi et al. 2021): image, maps and boxes scaled, cropped, padded together.

An image is scaled by a random factor of the size that just fits into a fixed frame, and a random
part of the frame's size is taken; where it is smaller the rest of the frame is missing, at the
right and below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ssl_vit.common.seeds import generator
from ssl_vit.data.missing import resized


@dataclass(frozen=True)
class Jitter:
    """Large-scale jitter: the frame's height and width in pixels, least and most factor of the size
    that fits into it, probability of a horizontal flip."""

    size: tuple[int, int]
    scales: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5


class Placement(NamedTuple):
    """Placement of an image in a frame.

    ``image``: its height and width; ``scaled``: those it is resized to; ``top``, ``left``: of the
    part of the scaled (and flipped) image that is taken; ``part``: height and width of that;
    ``frame``: those of the frame, in whose top left corner the part lies.
    """

    image: tuple[int, int]
    scaled: tuple[int, int]
    top: int
    left: int
    part: tuple[int, int]
    frame: tuple[int, int]
    flipped: bool = False

    @property
    def padding(self) -> Bool[Tensor, "h w"]:
        """True where the frame lies outside of the image."""
        outside = torch.ones(self.frame, dtype=torch.bool)
        outside[: self.part[0], : self.part[1]] = False
        return outside


def fitted(image: tuple[int, int], frame: tuple[int, int]) -> Placement:
    """Placement of a whole image, as large as fits into the frame."""
    return _placed(image, frame, 1.0)


def draw_placement(image: tuple[int, int], jitter: Jitter, key: int) -> Placement:
    """Placement of an image of this height and width, a function of ``key``."""
    rng = generator(key)
    factor = float(rng.uniform(*jitter.scales))
    rows, columns, flip = rng.random(3).tolist()
    whole = _placed(image, jitter.size, factor)
    spare = [s - p for s, p in zip(whole.scaled, whole.part, strict=True)]
    return whole._replace(
        top=int(rows * (spare[0] + 1)),
        left=int(columns * (spare[1] + 1)),
        flipped=flip < jitter.flip,
    )


def _placed(image: tuple[int, int], frame: tuple[int, int], factor: float) -> Placement:
    """Placement of the top left part of an image scaled by a factor of what fits."""
    scale = factor * min(frame[0] / image[0], frame[1] / image[1])
    height, width = (max(1, round(side * scale)) for side in image)
    part = min(height, frame[0]), min(width, frame[1])
    return Placement(image, (height, width), 0, 0, part, frame)


def place_image(image: Shaped[Tensor, "c h w"], at: Placement) -> Shaped[Tensor, "c r s"]:
    """The frame with the image in it, bicubically resized; missing pixels (NaN) stay missing.

    What lies outside of the image is NaN, or 0 in 8-bit images (``Placement.padding``).
    """
    whole = resized(image.flip(-1) if at.flipped else image, at.scaled)
    fill = torch.nan if image.is_floating_point() else 0
    frame = torch.full((len(image), *at.frame), fill, dtype=image.dtype)
    (height, width), top, left = at.part, at.top, at.left
    frame[:, :height, :width] = whole[:, top : top + height, left : left + width]
    return frame


def place_map(
    values: Shaped[Tensor, "*n h w"], at: Placement, fill: int | float = 0
) -> Shaped[Tensor, "*n r s"]:
    """The frame with maps of the image's pixels in it (classes, masks, depths): each pixel has the
    value at its centre, nothing is mixed; ``fill`` lies outside."""
    rows, columns = (
        (((torch.arange(part) + start + 0.5) * (old / new)).long().clamp(max=old - 1))
        for part, start, old, new in zip(
            at.part, (at.top, at.left), at.image, at.scaled, strict=True
        )
    )
    columns = at.image[1] - 1 - columns if at.flipped else columns
    frame = torch.full((*values.shape[:-2], *at.frame), fill, dtype=values.dtype)
    frame[..., : at.part[0], : at.part[1]] = values[..., rows[:, None], columns]
    return frame


def place_boxes(boxes: Float[Tensor, "k 4"], at: Placement) -> Float[Tensor, "k 4"]:
    """Boxes (left, top, right, bottom) in pixels of the frame, cut where the part ends; empty ones
    are those that lie outside of it."""
    left, top, right, bottom = boxes.unbind(1)
    if at.flipped:
        left, right = at.image[1] - right, at.image[1] - left
    down, across = (new / old for new, old in zip(at.scaled, at.image, strict=True))
    height, width = at.part
    return torch.stack(
        [
            (left * across - at.left).clamp(0, width),
            (top * down - at.top).clamp(0, height),
            (right * across - at.left).clamp(0, width),
            (bottom * down - at.top).clamp(0, height),
        ],
        dim=1,
    )


class Placed(NamedTuple):
    """Image, maps and boxes in a frame, and where they were placed."""

    image: Tensor
    maps: dict[str, Tensor]
    boxes: Tensor
    at: Placement


def place(
    image: Shaped[Tensor, "c h w"],
    maps: Mapping[str, Tensor],
    boxes: Float[Tensor, "k 4"],
    at: Placement,
    fills: Mapping[str, int | float] | None = None,
) -> Placed:
    """Place an image, maps of its pixels, (..., h, w) by name, and boxes, all alike.

    ``fills``: what a map has outside of the image, if not 0.
    """
    fills = fills or {}
    placed = {name: place_map(m, at, fills.get(name, 0)) for name, m in maps.items()}
    return Placed(place_image(image, at), placed, place_boxes(boxes, at), at)
