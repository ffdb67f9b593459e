"""COCO's detection metrics, by pycocotools: average precision over IoU thresholds and classes."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from ssl_vit.data.base import Source, units
from ssl_vit.data.coco import CocoSource, coco_of
from ssl_vit.evaluators.detect import Detections
from ssl_vit.evaluators.intervals import resampled
from ssl_vit.evaluators.score import Score

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""Names of the first numbers of pycocotools' summary: over IoU 0.50 to 0.95, at 0.50, at 0.75, and
of objects below 32 x 32 pixels, below 96 x 96, and above."""
KINDS = {"boxes": "bbox", "masks": "segm"}
_ALL = 0  # range of sizes that holds all
_RESAMPLES = 200


def score_detections(
    found: Detections, source: Source, kind: str, setting: str, seed: int
) -> Score:
    """Score of ``boxes`` or ``masks``, in percent; a metric of no object is left out.

    The interval is that of AP by a bootstrap over images, or over their groups.
    """
    coco, rows = coco_of(source, "--data.val")
    places = [int(rows[one.index]) for one in found.images]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        made = evaluated(coco, places, found, KINDS[kind])
    values = made.stats[: len(METRICS)].tolist()
    metrics = {name: 100 * v for name, v in zip(METRICS, values, strict=True) if v >= 0}
    precision = made.eval["precision"][:, :, :, _ALL, -1]  # IoU, recall, class
    names = coco.classes or ()
    by_class = {
        name: 100 * float(precision[:, :, n].mean())
        for n, name in enumerate(names)
        if (precision[:, :, n] >= 0).all()
    }
    index = np.array([one.index for one in found.images])
    together = units(source)
    groups = None if together is None else together[index][np.argsort(places)]
    details: dict[str, Any] = {"without_objects": [n for n in METRICS if n not in metrics]}
    if groups is not None:
        details["interval_of_groups"] = len(np.unique(groups))
    interval = ap_interval(made, seed, groups)
    return Score(kind, setting, metrics or {"ap": 0.0}, interval, by_class, None, details)


def evaluated(coco: CocoSource, places: Sequence[int], found: Detections, kind: str) -> Any:
    """COCOeval of pycocotools on these images, accumulated and summarized."""
    from pycocotools.cocoeval import COCOeval

    truth = _library(coco, places, true_annotations(coco, places, kind))
    guesses = _library(coco, places, [])
    if results := list(results_of(places, found, kind)):
        guesses = truth.loadRes(results)
    made = COCOeval(truth, guesses, kind)
    made.params.imgIds = sorted(places)
    made.evaluate()
    made.accumulate()
    made.summarize()
    return made


def _library(coco: CocoSource, places: Sequence[int], annotations: list[dict[str, Any]]) -> Any:
    """The library's own data set of these images."""
    from pycocotools.coco import COCO

    made = COCO()
    sizes = coco.sizes
    made.dataset = {
        "info": {},
        "images": [
            {"id": p, "height": int(sizes[p, 0]), "width": int(sizes[p, 1])} for p in places
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(coco.classes or ())],
        "annotations": annotations,
    }
    made.createIndex()
    return made


def true_annotations(coco: CocoSource, places: Sequence[int], kind: str) -> list[dict[str, Any]]:
    """Annotations of these images as the library takes them. Ids count from 1: it takes an object
    of id 0 for none."""
    known, made = coco.annotations, []
    for place in places:
        for row in range(int(known.first[place]), int(known.first[place + 1])):
            one = {
                "id": row + 1,
                "image_id": place,
                "category_id": int(known.numbers[row]),
                "bbox": known.boxes[row].tolist(),
                "area": float(known.areas[row]),
                "iscrowd": int(known.crowd[row]),
            }
            if kind == "segm":
                shape = json.loads(known.shapes[row] or b"[]")
                # A crowd may lack it; the library takes no empty one.
                one["segmentation"] = shape or _outline(*one["bbox"])
            made.append(one)
    return made


def _outline(left: float, top: float, width: float, height: float) -> list[list[float]]:
    """Polygon of a box."""
    right, bottom = left + width, top + height
    return [[left, top, right, top, right, bottom, left, bottom]]


def results_of(places: Sequence[int], found: Detections, kind: str) -> list[dict[str, Any]]:
    """Detections as the library takes them."""
    made = []
    for place, one in zip(places, found.images, strict=True):
        boxes = one.boxes.double()
        sides = (boxes[:, 2:] - boxes[:, :2]).tolist()
        for n, (corner, score) in enumerate(
            zip(boxes[:, :2].tolist(), one.scores.tolist(), strict=True)
        ):
            result = {"image_id": place, "category_id": int(one.classes[n]), "score": score}
            if kind == "segm":
                assert one.masks is not None
                result["segmentation"] = one.masks[n]
            else:
                result["bbox"] = [*corner, *sides[n]]
            made.append(result)
    return made


@dataclass
class _Ranked:
    """Detections of a class, best first, and its objects, with the image of each.

    ``hits``, ``counted``: of each IoU threshold, whether a detection found an object, and whether
    it counts at all.
    """

    images: Int64[np.ndarray, " d"]
    hits: Bool[np.ndarray, "t d"]
    counted: Bool[np.ndarray, "t d"]
    objects: Int64[np.ndarray, " o"]

    def precision(
        self, counts: Int64[np.ndarray, " images"], recalls: Float[np.ndarray, " r"]
    ) -> float | None:
        """Average precision over thresholds if each image is there so often; None: no object is."""
        total = int(counts[self.objects].sum())
        if not total:
            return None
        weight = counts[self.images]
        values = []
        for hits, counted in zip(self.hits, self.counted, strict=True):
            right = (weight * hits).cumsum()
            seen = (weight * counted).cumsum()
            precision = right / np.maximum(seen, 1)
            best = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(right / total, recalls, side="left")
            values.append(np.append(best, 0.0)[np.minimum(at, len(best))].mean())
        return float(np.mean(values))


def ap_interval(
    made: Any, seed: int, groups: Int64[np.ndarray, " n"] | None = None
) -> tuple[float, float]:
    """Interval of AP in percent, by resampling images; matches of detections and objects, which
    are within an image, stay. ``groups``: of the images in their order."""
    n = len(made.params.imgIds)
    ranked = [r for k in range(len(made.params.catIds)) if (r := _ranked(made, k, n)) is not None]
    group = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]

    def ap(counts: np.ndarray) -> float | None:
        found = [r.precision(counts[group], made.params.recThrs) for r in ranked]
        known = [p for p in found if p is not None]
        return 100 * float(np.mean(known)) if known else None

    return resampled(ap, int(group.max()) + 1, _RESAMPLES, seed)


def _ranked(made: Any, category: int, n: int) -> _Ranked | None:
    """Detections of a class from COCOeval's images; None: it has no object."""
    ranges = len(made.params.areaRng)
    first = category * ranges * n + _ALL * n
    images = [(i, one) for i, one in enumerate(made.evalImgs[first : first + n]) if one is not None]
    objects = [np.full(int((one["gtIgnore"] == 0).sum()), i) for i, one in images]
    if not sum(map(len, objects)):
        return None
    scores = np.concatenate([one["dtScores"] for _, one in images])
    order = np.argsort(-scores, kind="mergesort")
    ignored = np.concatenate([one["dtIgnore"] for _, one in images], axis=1)[:, order].astype(bool)
    matched = np.concatenate([one["dtMatches"] for _, one in images], axis=1)[:, order] > 0
    places = np.concatenate([np.full(len(one["dtScores"]), i) for i, one in images])[order]
    return _Ranked(
        places.astype(np.int64),
        matched & ~ignored,
        ~ignored,
        np.concatenate(objects).astype(np.int64),
    )
