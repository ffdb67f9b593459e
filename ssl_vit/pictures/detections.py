"""Pictures of detections: boxes and masks, those of the annotations beside those found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ssl_vit.common.figures import picture_rows

# Okabe and Ito (2008): they differ with any colour blindness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
_TEXT, _MARGIN = 14, 2  # pixels of a label's text, and of its background around it
_EVEN = 0.179  # luminance on which black and white text have the same contrast (WCAG 2.2)


class Drawing(NamedTuple):
    """Boxes (left, top, right, bottom), classes, texts and perhaps masks to draw on an image, the
    uppermost first; ``nothing``: the text where there is none."""

    boxes: Tensor
    classes: Sequence[int]
    texts: Sequence[str]
    masks: Bool[Tensor, "k h w"] | None = None
    nothing: str = ""


def drawn(image: UInt8[np.ndarray, "h w 3"], what: Drawing) -> UInt8[np.ndarray, "h w 3"]:
    """The image with boxes, their labels and masks, one colour for each class."""
    made = torch.from_numpy(image.copy()).permute(2, 0, 1)
    colours = [_COLOURS[c % len(_COLOURS)] for c in what.classes]
    if what.masks is not None and len(what.masks):
        made = draw_segmentation_masks(made, what.masks, alpha=0.5, colors=list(colours))
    sides = what.boxes[:, 2:] - what.boxes[:, :2] if len(what.boxes) else what.boxes
    keep = [n for n in reversed(range(len(what.boxes))) if bool((sides[n] >= 1).all())]
    if keep:
        made = draw_bounding_boxes(
            made,
            what.boxes[keep],
            colors=[colours[n] for n in keep],
            width=max(1, min(image.shape[:2]) // 200),
        )
    picture = Image.fromarray(made.permute(1, 2, 0).contiguous().numpy())
    for n in keep:
        left, top = what.boxes[n, :2].tolist()
        _label(picture, what.texts[n], int(left), int(top), colours[n])
    if not keep and what.nothing:
        _label(picture, what.nothing, 0, 0, "white")
    return np.asarray(picture)


def _label(picture: Image.Image, text: str, left: int, top: int, background: str) -> None:
    """Write a text on a filled background, above the corner of its box where there is room."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=_TEXT)
    text = _fitting(text, lambda some: draw.textlength(some, font) <= picture.width - 2 * _MARGIN)
    width, height = (int(v) + 2 * _MARGIN for v in draw.textbbox((0, 0), text, font=font)[2:])
    left = max(0, min(left, picture.width - width))
    top = top - height if top >= height else max(0, top)
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=background)
    ink = "black" if _luminance(background) > _EVEN else "white"
    draw.text((left + _MARGIN, top + _MARGIN), text, fill=ink, font=font)


def _fitting(text: str, fits: Callable[[str], bool]) -> str:
    """A label as it is or, where that does not fit, its name cut short; its score stays."""
    name, space, last = text.rpartition(" ")
    if not last.isdecimal():
        name, space, last = text, "", ""
    shown = text
    while name and not fits(shown):
        name = name[:-1]
        shown = f"{name.rstrip()}…{space}{last}"
    return shown


def _luminance(colour: str) -> float:
    """Relative luminance of a colour in sRGB, 0 to 1 (WCAG 2.2)."""
    values = np.array(ImageColor.getrgb(colour)[:3]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def detections_panel(
    images: UInt8[np.ndarray, "n h w 3"], truth: Sequence[Drawing], found: Sequence[Drawing]
) -> UInt8[np.ndarray, "height width 3"]:
    """Detections panel: a row for each image, annotated and as the detector sees it."""
    columns = {
        "annotations": np.stack([drawn(i, d) for i, d in zip(images, truth, strict=True)]),
        "detections": np.stack([drawn(i, d) for i, d in zip(images, found, strict=True)]),
    }
    return picture_rows(columns, "Colours are classes; numbers after names are scores in %.")
