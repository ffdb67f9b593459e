"""COCO's annotation file, read and checked: a mistake in it is an error that names the entry.

The format is that of COCO (Lin et al. 2014; cocodataset.org/#format-data): ``images`` (id,
file_name, height, width), ``categories`` (id, name) and ``annotations`` (image_id, category_id,
bbox: left, top, width and height in pixels; perhaps area, iscrowd, segmentation).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.names import Names

log = logging.getLogger("ssl_vit")
_SLACK = 1.0  # pixels that a box may reach over the edge without a word, as rounded ones do
_MANY = 0.2  # share of boxes over the edge above which they may be written in another way
_CORNERS = "; are they x1 y1 x2 y2? COCO's are x, y, width, height"


@dataclass(frozen=True)
class Annotations:
    """Annotations of all images, in their order: m rows, those of image i from ``first[i]`` to
    before ``first[i + 1]``.

    Arrays, which workers share: ``boxes``: left, top, width and height, as in the file;
    ``areas``: in pixels; ``numbers``: classes, from 0; ``crowd``: of many objects together, not to
    learn from, and not counted; ``shapes``: each one's segmentation as JSON, empty where none is.
    """

    first: Int64[np.ndarray, " n_1"]
    ids: Int64[np.ndarray, " m"]
    numbers: Int64[np.ndarray, " m"]
    boxes: Float64[np.ndarray, "m 4"]
    areas: Float64[np.ndarray, " m"]
    crowd: Bool[np.ndarray, " m"]
    shapes: Names

    def rows(self, image: int) -> slice:
        """Rows of an image."""
        return slice(int(self.first[image]), int(self.first[image + 1]))

    @property
    def counts(self) -> Int64[np.ndarray, " n"]:
        """Number of each image's objects that are no crowds."""
        before = np.concatenate([[0], np.cumsum(~self.crowd)])
        return np.diff(before[self.first])


def read_content(file: Path) -> dict[str, list[Any]]:
    """The three lists of an annotation file."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        there = isinstance(content, dict) and isinstance(content.get(key), list)
        check(there, f"{file} is not in COCO's format: it has no list {key!r}")
        check(
            all(isinstance(one, dict) for one in content[key]),
            f"{file}: the list {key!r} must hold objects",
        )
    return dict(content)


def read_categories(file: Path, given: list[Any]) -> tuple[dict[int, int], tuple[str, ...]]:
    """Class number of each category's id, in the order of ids, and names of the classes."""
    check(len(given) > 0, f"{file} has no category")
    names: dict[int, str] = {}
    for one in given:
        number, name = one.get("id"), one.get("name")
        fits = isinstance(number, int) and isinstance(name, str) and number not in names
        check(fits, f"{file}: a category needs an id of its own and a name; one is {one!r:.80}")
        names[number] = name
    ids = sorted(names)
    return {own: n for n, own in enumerate(ids)}, tuple(names[own] for own in ids)


def read_images(file: Path, given: list[Any]) -> tuple[dict[int, int], list[str], np.ndarray]:
    """Place of each image's id, file names, and sizes (n, 2)."""
    check(len(given) > 0, f"{file} has no image")
    places: dict[int, int] = {}
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    for one in given:
        number, name, size = (
            one.get("id"),
            one.get("file_name"),
            (one.get("height"), one.get("width")),
        )
        fits = isinstance(number, int) and isinstance(name, str) and bool(name)
        fits = fits and all(isinstance(side, int) and side > 0 for side in size)
        rule = "an image needs an id, a file_name, and height and width in pixels"
        check(fits, f"{file}: {rule}; one is {one!r:.100}")
        check(number not in places, f"{file}: two images have the id {number}")
        places[number] = len(names)
        names.append(name)
        sizes.append(size)
    return places, names, np.array(sizes, dtype=np.int64)


def check_files(file: Path, folder: Path, ids: dict[int, int], names: list[str]) -> None:
    """Check that every image is a file. Folders are listed: to ask for each file would take minutes
    on a network disk."""
    there: dict[str, set[str]] = {}
    missing = []
    for number, place in ids.items():
        inner, own = os.path.split(names[place])
        if inner not in there:
            path = folder / inner
            there[inner] = set(os.listdir(path)) if path.is_dir() else set()
        if own not in there[inner]:
            missing.append((number, names[place]))
    if missing:
        number, name = missing[0]
        raise UserError(
            f"{file} names {len(missing):,} of {len(names):,} images that are not in {folder}; the "
            f"first: {name} (image {number})"
        )


class AnnotationReader:
    """Reader of annotations: checks each, and puts them into arrays in the images' order."""

    def __init__(
        self, file: Path, places: dict[int, int], sizes: np.ndarray, numbers: dict[int, int]
    ) -> None:
        self.file, self.places, self.sizes, self.numbers = file, places, sizes.tolist(), numbers
        self.left_out: list[str] = []
        self.over: list[str] = []

    def read(self, given: list[Any], max_bad: float) -> Annotations:
        """All usable annotations.

        Raises:
            UserError: one is malformed, or too many are left out.
        """
        rows = [row for i, one in enumerate(given) if (row := self._row(i, one)) is not None]
        self._warn_left_out(len(given), max_bad)
        rows.sort(key=lambda row: row[0])  # stable: in the file's order within an image
        places = np.array([row[0] for row in rows], dtype=np.int64)
        return Annotations(
            first=np.searchsorted(places, np.arange(len(self.sizes) + 1)).astype(np.int64),
            ids=np.array([row[1] for row in rows], dtype=np.int64),
            numbers=np.array([row[2] for row in rows], dtype=np.int64),
            boxes=np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 4),
            areas=np.array([row[4] for row in rows], dtype=np.float64),
            crowd=np.array([row[5] for row in rows], dtype=bool),
            shapes=Names.of(row[6] for row in rows),
        )

    def _row(self, i: int, one: dict[str, Any]) -> tuple[Any, ...] | None:
        """Place of the image, id, class, box, area, crowd and shape of an annotation; None: it is
        left out."""
        name = f"annotation {one['id']}" if isinstance(one.get("id"), int) else f"annotation [{i}]"
        image: Any = one.get("image_id")
        category: Any = one.get("category_id")
        what = f"{self.file}: {name}"
        check(
            isinstance(image, int) and image in self.places,
            f"{what} is of image {image!r}, which is not among its {len(self.places):,} images",
        )
        check(
            isinstance(category, int) and category in self.numbers,
            f"{what} is of category {category!r}, which is not among its {len(self.numbers):,} "
            "categories",
        )
        box = one.get("bbox")
        fits = isinstance(box, list) and len(box) == 4 and all(map(_finite, box))
        check(fits, f"{what} has the bbox {box!r:.60}; it must be left, top, width, height")
        assert isinstance(box, list)
        box = [float(v) for v in box]
        place = self.places[image]
        if not self._usable(name, box, *self.sizes[place]):
            return None
        area = one.get("area", box[2] * box[3])
        check(_finite(area) and area >= 0, f"{what} has the area {area!r:.40}; a number of pixels")
        shape = self._shape(what, one.get("segmentation"), self.sizes[place])
        own = one["id"] if isinstance(one.get("id"), int) else i
        return place, own, self.numbers[category], box, area, bool(one.get("iscrowd", 0)), shape

    def _usable(self, name: str, box: Sequence[float], height: int, width: int) -> bool:
        """True if some of a box lies within its image; otherwise it is noted."""
        left, top, wide, high = box
        said = f"{name}, bbox {' '.join(f'{v:g}' for v in box)}"
        if wide <= 0 or high <= 0:
            self.left_out.append(f"{said}, is empty")
            return False
        if left >= width or top >= height or left + wide <= 0 or top + high <= 0:
            self.left_out.append(f"{said}, lies outside of its image, {width} x {height}")
            return False
        out = max(-left, -top, left + wide - width, top + high - height)
        if out > _SLACK:
            self.over.append(f"{said}, of an image of {width} x {height}")
        return True

    def _shape(self, what: str, shape: Any, size: Sequence[int]) -> bytes:
        """Segmentation as JSON; empty: there is none."""
        if not shape:
            return b""
        if isinstance(shape, list):
            fits = all(
                isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _all_finite(p)
                for p in shape
            )
            check(fits, f"{what} has a segmentation that is no list of polygons: x, y of 3 or more")
        else:
            counts = shape.get("counts") if isinstance(shape, dict) else None
            fits = isinstance(counts, str) or (
                isinstance(counts, list)
                and all(isinstance(c, int) and c >= 0 for c in counts)
                and sum(counts) == math.prod(size)
            )
            fits = fits and list(shape.get("size", ())) == list(size)
            rule = f"run lengths must have counts, and the size of the image, {list(size)}"
            check(fits, f"{what} has a segmentation that does not fit: {rule}")
        return json.dumps(shape, separators=(",", ":")).encode()

    def _warn_left_out(self, count: int, max_bad: float) -> None:
        """Warn of annotations that are left out or cut."""
        if self.over:
            n, first = len(self.over), self.over[0]
            text = "warning: %s: %s of %s boxes reach over the edge and end there; the first: %s%s"
            asked = _CORNERS if n > _MANY * count else ""
            log.warning(text, self.file, f"{n:,}", f"{count:,}", first, asked)
        if not self.left_out:
            return
        n, first = len(self.left_out), self.left_out[0]
        said = f"{self.file}: {n:,} of {count:,} annotations cannot be used; the first: {first}"
        check(n <= max_bad * count, f"{said}; --data.max-bad is {max_bad:g}")
        log.warning("warning: %s; they are left out", said)


def _all_finite(values: list[Any]) -> bool:
    """True for finite numbers; of the million corners of a large file one by one takes long."""
    try:
        array = np.array(values)
    except ValueError:  # lists within
        return False
    return array.ndim == 1 and array.dtype.kind in "if" and bool(np.isfinite(array).all())


def _finite(value: Any) -> bool:
    """True for a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
