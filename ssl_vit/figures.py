"""Pictures for people: batches of images as one captioned uint8 array."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP = 4
_TEXT = 16


def to_rgb(images: Float[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Images in 0..1 as RGB: 3 channels as they are, fewer as gray, of more the first three."""
    channels = images.shape[1]
    chosen = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    scaled = (chosen.float().clamp(0, 1) * 255).round().byte()
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def picture_rows(
    columns: dict[str, UInt8[np.ndarray, "b h w 3"]], caption: str, least: int = 96
) -> UInt8[np.ndarray, "height width 3"]:
    """One row an image, one titled column an entry, the caption below.

    Images smaller than ``least`` pixels are enlarged by a whole factor, pixels kept square.
    """
    batches = list(columns.values())
    n, h, w = batches[0].shape[:3]
    zoom = max(1, -(-least // min(h, w)))
    h, w = h * zoom, w * zoom
    font = ImageFont.load_default(size=_TEXT - 4)
    lines = _wrap(caption, len(batches) * (w + _GAP) - 2 * _GAP, font)
    height = _TEXT + n * (h + _GAP) + _TEXT * len(lines) + _GAP
    sheet = Image.new("RGB", (len(batches) * (w + _GAP) + _GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(columns.items()):
        x = _GAP + column * (w + _GAP)
        draw.text((x, 0), title, fill="black", font=font)
        for row in range(n):
            cell = Image.fromarray(images[row].repeat(zoom, 0).repeat(zoom, 1))
            sheet.paste(cell, (x, _TEXT + row * (h + _GAP)))
    for i, line in enumerate(lines):
        y = _TEXT + n * (h + _GAP) + i * _TEXT
        draw.text((_GAP, y), line, fill="black", font=font)
    return np.asarray(sheet)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text as lines that are no wider than ``width`` pixels where words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getbbox(longer)[2] > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
