"""Figures: batches of images as one captioned uint8 array."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_vit.common.files import write_atomically

_GAP = 4
_TEXT = 16
# Chosen in CIE LCh: lightness 2 to 97 in even steps, hue from violet to yellow, maximum chroma in
# sRGB.
_HEAT = np.array(
    [
        (6, 7, 12),
        (27, 30, 100),
        (113, 33, 131),
        (203, 7, 107),
        (247, 81, 67),
        (251, 149, 36),
        (255, 202, 80),
        (255, 248, 197),
    ]
)


def to_rgb(images: Float[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Convert images in 0..1 to RGB: 3 channels as they are, fewer as gray, of more the first 3."""
    channels = images.shape[1]
    chosen = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    scaled = (chosen.float().clamp(0, 1) * 255).round().byte()
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def enlarged(
    images: UInt8[np.ndarray, "b h w 3"], least: int = 96
) -> UInt8[np.ndarray, "b height width 3"]:
    """Enlarge images smaller than ``least`` pixels by an integer factor, by nearest neighbour."""
    zoom = max(1, -(-least // min(images.shape[1:3])))
    return images.repeat(zoom, 1).repeat(zoom, 2)


def heat(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Heat map: values in 0..1 as colours from black over violet and orange to pale yellow.

    Lightness (CIE L*) rises evenly, so that the order is visible with any colour vision, and in
    gray print.
    """
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, stops, _HEAT[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def squares(
    values: np.ndarray, grid: tuple[int, int], size: tuple[int, int]
) -> UInt8[np.ndarray, "b height width c"] | Bool[np.ndarray, "b height width c"]:
    """Upsample patches (b, n, c) to images of this size, each patch a constant square."""
    rows, columns = (np.arange(s) * g // s for s, g in zip(size, grid, strict=True))
    return values.reshape(len(values), *grid, -1)[:, rows][:, :, columns]


def picture_rows(
    columns: dict[str, UInt8[np.ndarray, "b h w 3"]], caption: str, least: int = 96, wrap: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Picture table: a row per image, a titled column per entry, the caption below.

    Images smaller than ``least`` pixels are enlarged by an integer factor. More than
    ``wrap`` columns (0: any number) continue on further lines, of about equal length. A title
    wider than its images wraps.
    """
    batches = {title: enlarged(images, least) for title, images in columns.items()}
    n, h, w = next(iter(batches.values())).shape[:3]
    lines = -(-len(batches) // wrap) if wrap else 1
    across = -(-len(batches) // lines)
    font = ImageFont.load_default(size=_TEXT - 4)
    # Titles wrap above their columns, which are as wide as the longest word needs, within reason.
    words = [_width(word, font) for title in batches for word in title.split()]
    wide = min(2 * w, max([w, *words]))
    titles = [_wrap(title, wide, font) for title in batches]
    head = _TEXT * max(map(len, titles))
    # Titles are at the top; if an image has several lines, above each of them.
    between = head if lines > 1 else 0
    line_height = h + _GAP + between
    row_height = lines * line_height + (2 * _GAP if lines > 1 else 0)
    bottom = head + n * row_height - between
    text = _wrap(caption, across * (wide + _GAP) - _GAP, font)
    size = (across * (wide + _GAP) + _GAP, bottom + _TEXT * len(text) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, images) in enumerate(zip(titles, batches.values(), strict=True)):
        x, line = _GAP + i % across * (wide + _GAP), i // across
        for row in range(n):
            y = head + row * row_height + line * line_height
            if between or row == 0:
                _write(draw, (x, y - _TEXT * len(title)), title, font)
            sheet.paste(Image.fromarray(images[row]), (x, y))
    _write(draw, (_GAP, bottom), text, font)
    return np.asarray(sheet)


def save_png(path: Path, picture: UInt8[np.ndarray, "height width 3"]) -> None:
    """Write a picture as PNG, atomically."""
    write_atomically(path, partial(Image.fromarray(picture).save, format="PNG"))


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: list[str], font: _Font
) -> None:
    """Lines of text, one below the other, from ``place`` on."""
    for i, words in enumerate(lines):
        draw.text((place[0], place[1] + i * _TEXT), words, fill="black", font=font)


def _width(text: str, font: _Font) -> int:
    """Pixels that a text takes."""
    return math.ceil(font.getbbox(text)[2])


def _wrap(text: str, width: int, font: _Font) -> list[str]:
    """The text as lines of at most ``width`` pixels; a longer word, as a path, is cut in parts."""
    lines = [""]
    for word in text.split():
        for part in _parts(word, width, font):
            longer = f"{lines[-1]} {part}".strip()
            if lines[-1] and _width(longer, font) > width:
                lines.append(part)
            else:
                lines[-1] = longer
    return lines


def _parts(word: str, width: int, font: _Font) -> Iterator[str]:
    """A word in parts of at most ``width`` pixels, if it is wider."""
    while len(word) > 1 and _width(word, font) > width:
        fits = [n for n in range(1, len(word)) if _width(word[:n], font) <= width]
        cut = max(fits, default=1)
        yield word[:cut]
        word = word[cut:]
    yield word
