"""Pictures of what a detector finds in the images of a source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ssl_vit.data.base import Source
from ssl_vit.data.coco import coco_of, drawn_shape
from ssl_vit.data.coco_images import WholeImages
from ssl_vit.data.jitter import Placement, fitted, place_boxes, place_map
from ssl_vit.data.view import View
from ssl_vit.evaluators.detect import Detections, Found
from ssl_vit.pictures.detections import Drawing, detections_panel
from ssl_vit.pictures.thumbnails import as_rgb

_SIDE = 400  # pixels of a picture; small images are enlarged, so that names fit
_SURE = 0.3  # score from which a detection is drawn
_FEW = 1  # detections drawn besides two for each annotated object


def picture_of(
    found: Detections, source: Source, view: View, count: int, classes: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """Picture of the first ``count`` images: their annotations, and detections that are likely.

    ``classes``: those of training; the source may lack the last of them.
    """
    factor = _SIDE / max(view.size)
    frame = (max(1, round(view.size[0] * factor)), max(1, round(view.size[1] * factor)))
    coco, rows = coco_of(source, "--data.val")
    images, truth, guesses = [], [], []
    for one in found.images[:count]:
        batch = WholeImages(source, frame, view.channels).__getitems__([one.index])
        inner = int(rows[one.index])
        height, width = coco.sizes[inner].tolist()
        at = fitted((height, width), frame)
        picture = as_rgb(batch.views.crops[0].nan_to_num(), view)[0]
        picture[at.padding.numpy()] = 255
        images.append(picture)
        objects = coco.objects(inner)
        masks = coco.masks(inner, objects.rows) if coco.has_masks else None
        boxes, numbers = torch.from_numpy(objects.boxes), objects.numbers.tolist()
        drawing = _drawing(boxes, numbers, [""] * len(numbers), masks, coco.classes or (), at)
        truth.append(drawing._replace(nothing="no objects"))
        guesses.append(_guess(one, classes, at, _FEW + 2 * len(numbers)))
    return detections_panel(np.stack(images), truth, guesses)


def _guess(one: Found, names: Sequence[str], at: Placement, most: int) -> Drawing:
    """Likely detections, ``most`` at most: a weak detector has many, which hide each other."""
    keep = (one.scores >= _SURE).nonzero().flatten().tolist()[:most]
    masks = None
    if one.masks is not None:
        height, width = at.image
        texts = [{**m, "counts": m["counts"].decode()} for m in (one.masks[n] for n in keep)]
        shapes = [drawn_shape(text, height, width) for text in texts]
        masks = np.stack(shapes) if shapes else np.zeros((0, height, width), np.uint8)
    scores = [f" {100 * float(one.scores[n]):.0f}" for n in keep]
    drawing = _drawing(one.boxes[keep], one.classes[keep].tolist(), scores, masks, names, at)
    return drawing._replace(nothing=f"nothing with a score of {100 * _SURE:.0f} % or more")


def _drawing(
    boxes: Tensor,
    classes: Sequence[int],
    texts: Sequence[str],
    masks: np.ndarray | None,
    names: Sequence[str],
    at: Placement,
) -> Drawing:
    """Drawing in pixels of the frame; ``texts`` follow the names of the classes."""
    placed = None if masks is None else place_map(torch.from_numpy(masks), at).bool()
    said = [names[c] + text for c, text in zip(classes, texts, strict=True)]
    return Drawing(place_boxes(boxes, at), classes, said, placed)
