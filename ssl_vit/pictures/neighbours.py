"""Nearest-neighbour panel: each query, then the images most similar to it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_vit.common.figures import enlarged, picture_rows

_WIDTH, _LEAST = 1400, 112
_FRAME, _BADGE, _STRIP = 4, 20, 15
# Two colours that differ in lightness and with any colour blindness (Okabe and Ito 2008).
_SAME, _OTHER = (0, 114, 178), (230, 120, 0)


def neighbours_panel(
    images: UInt8[np.ndarray, "q h w 3"],
    shown: UInt8[np.ndarray, "q k h w 3"],
    similarity: Float[np.ndarray, "q k"] | Float[Tensor, "q k"],
    same: Bool[np.ndarray, "q k"] | Bool[Tensor, "q k"] | None,
    about: str = "",
    right: str = "of the query's class",
) -> UInt8[np.ndarray, "height width 3"]:
    """Nearest-neighbour panel: a row per query, then its neighbours, each with its cosine below.

    Args:
        same: whether a neighbour is what it should be, shown by the colour of its frame and a mark
            in its corner; None: unknown, nothing is framed.
        about: beginning of the caption; ``right``: what a neighbour should be, in words.
    """
    cosines = np.asarray(similarity)
    width = max(_LEAST, _WIDTH // (cosines.shape[1] + 1) - 4)
    images = np.stack([_at_most(image, width) for image in images])
    shown = np.stack([[_at_most(image, width) for image in row] for row in shown])
    columns = {"query": np.stack([_cell(image, "", None) for image in enlarged(images)])}
    for place in range(cosines.shape[1]):
        cells = [
            _cell(image, f"{cosine:.3f}", None if same is None else bool(same[row, place]))
            for row, (image, cosine) in enumerate(
                zip(enlarged(shown[:, place]), cosines[:, place], strict=True)
            )
        ]
        columns[f"{place + 1}"] = np.stack(cells)
    caption = f"{about} Number below: cosine of the two features. ".lstrip()
    if same is not None:
        hits, count = int(np.asarray(same).sum()), np.asarray(same).size
        caption += (
            f"Blue, with a tick: {right}; orange, with a cross: not. {hits} of {count} are {right}."
        )
    return picture_rows(columns, caption, wrap=max(4, _WIDTH // (columns["query"].shape[2] + 4)))


def _at_most(image: UInt8[np.ndarray, "h w 3"], width: int) -> UInt8[np.ndarray, "height w 3"]:
    """Image scaled down to this width if it is wider."""
    height, own = image.shape[:2]
    if own <= width:
        return image
    size = (width, max(1, round(height * width / own)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _cell(
    image: UInt8[np.ndarray, "h w 3"], text: str, same: bool | None
) -> UInt8[np.ndarray, "height w 3"]:
    """Cell of the panel: an image above a white strip with text, framed if its class is known."""
    height, width = image.shape[:2]
    sheet = Image.new("RGB", (width, height + _STRIP), "white")
    sheet.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(sheet)
    draw.text((1, height), text, fill="black", font=ImageFont.load_default(size=_STRIP - 4))
    if same is not None:
        colour = _SAME if same else _OTHER
        draw.rectangle((0, 0, width - 1, height - 1), outline=colour, width=_FRAME)
        left = width - _BADGE
        draw.rectangle((left, 0, width - 1, _BADGE - 1), fill=colour)
        for line in _mark(same):
            draw.line([(left + x, y) for x, y in line], fill="white", width=3)
    return np.asarray(sheet)


def _mark(same: bool) -> list[list[tuple[int, int]]]:
    """Tick or cross, as lines within the badge."""
    if same:
        return [[(4, 10), (8, 14), (15, 5)]]
    return [[(5, 5), (14, 14)], [(5, 14), (14, 5)]]
