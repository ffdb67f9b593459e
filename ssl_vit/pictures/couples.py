"""Couples panel: pairs of images side by side, a text below each pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ssl_vit.common.figures import enlarged, picture_rows

_ACROSS, _STRIP, _GAP = 4, 16, 2


def couples_panel(
    ours: UInt8[np.ndarray, "n h w 3"],
    theirs: UInt8[np.ndarray, "n h w 3"],
    texts: Sequence[str],
    caption: str,
) -> UInt8[np.ndarray, "height width 3"]:
    """Couples panel: four pairs in a row, in order, row by row."""
    left, right = enlarged(ours), enlarged(theirs)
    cells = [_cell(*pair) for pair in zip(left, right, texts, strict=True)]
    across = min(_ACROSS, len(cells))
    blank = np.full_like(cells[0], 255)
    cells += [blank] * (-len(cells) % across)
    columns = {" " * i: np.stack(cells[i::across]) for i in range(across)}
    return picture_rows(columns, caption)


def _cell(
    left: UInt8[np.ndarray, "h w 3"], right: UInt8[np.ndarray, "h w 3"], text: str
) -> UInt8[np.ndarray, "height width 3"]:
    """Two images above a white strip with a text."""
    height, width = left.shape[:2]
    sheet = Image.new("RGB", (2 * width + _GAP, height + _STRIP), "white")
    sheet.paste(Image.fromarray(left), (0, 0))
    sheet.paste(Image.fromarray(right), (width + _GAP, 0))
    draw = ImageDraw.Draw(sheet)
    draw.text((1, height), text, fill="black", font=ImageFont.load_default(size=_STRIP - 4))
    return np.asarray(sheet)
