"""COCO source: images with boxes, classes and masks of the objects in them (``data.coco_file``)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Source, Subset
from ssl_vit.data.coco_file import (
    AnnotationReader,
    Annotations,
    check_files,
    read_categories,
    read_content,
    read_images,
)
from ssl_vit.data.files import FileSource
from ssl_vit.data.names import Names
from ssl_vit.data.raster import BadImage

ANNOTATIONS_FILE = "annotations.json"
_FORM = "coco:IMAGES_FOLDER:ANNOTATIONS.json, or coco:ROOT with ROOT/images and ROOT/" + (
    ANNOTATIONS_FILE
)


class Objects(NamedTuple):
    """Objects of an image that are no crowds, k of them.

    ``boxes``: left, top, right and bottom in pixels, within the image. ``rows``: in the
    annotations.
    """

    boxes: Float32[np.ndarray, "k 4"]
    numbers: Int64[np.ndarray, " k"]
    rows: Int64[np.ndarray, " k"]


class CocoSource(FileSource):
    """COCO source: image files below ``root``, ``sizes`` their heights and widths by the file."""

    def __init__(
        self,
        spec: str,
        root: bytes,
        files: Names,
        sizes: Int64[np.ndarray, "n 2"],
        classes: tuple[str, ...],
        annotations: Annotations,
    ) -> None:
        super().__init__(spec, root, files)
        self.sizes, self.classes, self.annotations = sizes, classes, annotations
        self.labels_from = "objects have classes, images have none"

    def listing(self) -> Iterable[np.ndarray]:
        """Names of the files, and their sizes in pixels."""
        return self.files.buffer, self.files.ends, self.sizes

    def objects(self, i: int) -> Objects:
        """Objects of image i that are no crowds."""
        found, rows = self.annotations, self.annotations.rows(i)
        chosen = np.arange(rows.start, rows.stop)[~found.crowd[rows]]
        left, top, width, height = found.boxes[chosen].T
        high, wide = self.sizes[i]
        corners = np.stack([left, top, left + width, top + height], axis=1)
        corners = corners.clip(0, [wide, high, wide, high]).astype(np.float32)
        return Objects(corners, found.numbers[chosen], chosen)

    def masks(self, i: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Masks of these annotations of image i, uint8 (k, h, w), 1 inside.

        Raises:
            BadImage: a segmentation cannot be drawn.
        """
        height, width = self.sizes[i].tolist()
        made = np.zeros((len(rows), height, width), dtype=np.uint8)
        for mask, row in zip(made, rows, strict=True):
            text = self.annotations.shapes[int(row)]
            try:
                mask[:] = drawn_shape(json.loads(text), height, width)
            except Exception as error:  # of the library: many kinds
                said = f"segmentation of annotation {self.annotations.ids[row]}"
                raise BadImage(f"{said} cannot be drawn: {error}") from error
        return made

    @property
    def has_masks(self) -> bool:
        """True if every object that is no crowd has a segmentation."""
        lengths = np.diff(self.annotations.shapes.ends, prepend=0)
        return bool((lengths[~self.annotations.crowd] > 0).all())

    def annotations_sha256(self) -> str:
        """SHA-256 of all annotations and classes."""
        digest = hashlib.sha256(repr(self.classes).encode())
        found = self.annotations
        for array in (
            self.sizes,
            found.first,
            found.numbers,
            found.boxes,
            found.areas,
            found.crowd,
        ):
            digest.update(np.ascontiguousarray(array).data)
        digest.update(found.shapes.buffer.data)
        return digest.hexdigest()


def coco_of(source: Source, option: str) -> tuple[CocoSource, np.ndarray]:
    """The COCO source behind a source, and which of its images the source has.

    Raises:
        UserError: it is of another kind.
    """
    indices = np.arange(len(source))
    if isinstance(source, Subset):
        indices, source = source.indices, source.source
    if not isinstance(source, CocoSource):
        raise UserError(f"{option} is {source.spec!r}; objects are read from {_FORM}")
    return source, indices


def object_counts(source: Source) -> Int64[np.ndarray, " n"]:
    """Number of objects of each image of a COCO source, crowds not counted."""
    coco, rows = coco_of(source, "the source")
    return coco.annotations.counts[rows]


def has_objects(source: Source) -> bool:
    """True if any image of a COCO source has an object."""
    return bool(object_counts(source).any())


def drawn_shape(shape: Any, height: int, width: int) -> np.ndarray:
    """Mask (height, width) uint8 of a segmentation: polygons, or run lengths."""
    from pycocotools import mask as library

    if isinstance(shape, dict) and isinstance(shape["counts"], str):
        runs = {"size": [height, width], "counts": shape["counts"].encode()}
        return np.asarray(library.decode(runs))
    runs = library.frPyObjects(shape, height, width)
    return np.asarray(library.decode(library.merge(runs) if isinstance(runs, list) else runs))


def open_coco(spec: str, rest: str, reading: ReadConfig | None = None) -> CocoSource:
    """Open ``coco:IMAGES:ANNOTATIONS.json`` or ``coco:ROOT``.

    Boxes that are empty or lie outside of their image are left out, with a warning that names the
    first; those that reach over its edge end there.

    Raises:
        UserError: not of this form; a file is missing; an annotation is of an unknown image or
            category, or malformed; or more annotations than ``max_bad`` allows are left out.
    """
    folder, file = _places(spec, rest)
    for option in ("tile", "level", "labels"):
        given = reading is not None and getattr(reading, option)
        check(not given, f"--data.{option} has no effect on coco: leave it out")
    check(
        reading is None or reading.slices != "all",
        "--data.slices is 'all'; annotations of coco are of one plane: name it",
    )
    content = read_content(file)
    numbers, classes = read_categories(file, content["categories"])
    ids, names, sizes = read_images(file, content["images"])
    check_files(file, folder, ids, names)
    most = float(getattr(reading, "max_bad", 0.05))
    found = AnnotationReader(file, ids, sizes, numbers).read(content["annotations"], most)
    files = Names.of(os.fsencode(name) for name in names)
    return CocoSource(spec, os.fsencode(folder), files, sizes, classes, found)


def _places(spec: str, rest: str) -> tuple[Path, Path]:
    """Folder of the images, and file of the annotations."""
    parts = rest.split(":")
    check(all(parts) and len(parts) <= 2, f"{spec!r} names no annotated images; allowed: {_FORM}")
    first = Path(parts[0]).expanduser()
    folder, file = first / "images", first / ANNOTATIONS_FILE
    if len(parts) == 2:
        folder, file = first, Path(parts[1]).expanduser()
    check(folder.is_dir(), f"{spec!r}: {folder} is no folder; allowed: {_FORM}")
    check(file.is_file(), f"{spec!r}: there is no file {file}; allowed: {_FORM}")
    return folder, file
