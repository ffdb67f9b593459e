"""Small COCO data sets: coloured rectangles and triangles on noise, with boxes and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as library

NAMES = ("square", "triangle")
_COLOURS = ((230, 30, 30), (30, 30, 230))


def content_of(
    root: Path, count: int = 6, size: tuple[int, int] = (48, 64), seed: int = 0, objects: int = 2
) -> dict[str, Any]:
    """Write ``count`` images of (height, width) into ``root/images``; returns their annotations.

    Ids of categories are 3 and 7, those of images begin with 10.
    """
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for n in range(count):
        pixels = rng.integers(90, 140, (*size, 3)).astype(np.uint8)
        for _ in range(objects):
            kind = int(rng.integers(2))
            side = int(rng.integers(14, 25))
            top, left = (int(rng.integers(0, s - side)) for s in size)
            polygon = [left, top, left + side, top, left + side, top + side]
            polygon += [left, top + side] if kind == 0 else []
            drawn = library.decode(library.merge(library.frPyObjects([polygon], *size)))
            pixels[drawn > 0] = _COLOURS[kind]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + n,
                    "category_id": (3, 7)[kind],
                    "bbox": [left, top, side, side],
                    "area": float(drawn.sum()),
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
        Image.fromarray(pixels).save(root / f"images/{n}.png")
        about = {"id": 10 + n, "file_name": f"{n}.png", "height": size[0], "width": size[1]}
        images.append(about)
    categories = [{"id": 7, "name": NAMES[1]}, {"id": 3, "name": NAMES[0]}]
    return {"images": images, "annotations": annotations, "categories": categories}


def written(root: Path, content: dict[str, Any]) -> str:
    """Write annotations; returns the data set's name for options."""
    (root / "annotations.json").write_text(json.dumps(content))
    return f"coco:{root}"


def coco_at(root: Path, **options: Any) -> str:
    """Both."""
    return written(root, content_of(root, **options))
