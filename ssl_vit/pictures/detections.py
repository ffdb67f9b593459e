"""Pictures of detections: boxes and masks, those of the annotations beside those found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ssl_vit.common.figures import picture_rows

# Okabe and Ito (2008): they differ with any colour blindness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")


class Drawing(NamedTuple):
    """Boxes (left, top, right, bottom), classes, texts and perhaps masks to draw on an image."""

    boxes: Tensor
    classes: Sequence[int]
    texts: Sequence[str]
    masks: Bool[Tensor, "k h w"] | None = None


def drawn(image: UInt8[np.ndarray, "h w 3"], what: Drawing) -> UInt8[np.ndarray, "h w 3"]:
    """The image with boxes and masks, one colour for each class."""
    made = torch.from_numpy(image.copy()).permute(2, 0, 1)
    colours = [_COLOURS[c % len(_COLOURS)] for c in what.classes]
    if what.masks is not None and len(what.masks):
        made = draw_segmentation_masks(made, what.masks, alpha=0.5, colors=list(colours))
    sides = what.boxes[:, 2:] - what.boxes[:, :2] if len(what.boxes) else what.boxes
    keep = [n for n in range(len(what.boxes)) if bool((sides[n] >= 1).all())]
    if keep:
        made = draw_bounding_boxes(
            made,
            what.boxes[keep],
            labels=[what.texts[n] for n in keep],
            colors=[colours[n] for n in keep],
            width=max(1, min(image.shape[:2]) // 200),
        )
    return np.asarray(made.permute(1, 2, 0))


def detections_panel(
    images: UInt8[np.ndarray, "n h w 3"], truth: Sequence[Drawing], found: Sequence[Drawing]
) -> UInt8[np.ndarray, "height width 3"]:
    """Detections panel: a row for each image, annotated and as the detector sees it."""
    columns = {
        "annotations": np.stack([drawn(i, d) for i, d in zip(images, truth, strict=True)]),
        "detections": np.stack([drawn(i, d) for i, d in zip(images, found, strict=True)]),
    }
    return picture_rows(columns, "Colours are classes; numbers are scores in %.")
