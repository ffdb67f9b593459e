"""Scenes: made-up rooms with objects whose boxes, masks and depths are known, for dense evaluators.

A pinhole camera, one unit above the floor, sees a wall and a floor covered with pictures. Objects
stand on the floor as flat pictures that face the camera: the further away, the smaller and the
higher in the image. What is seen of each, and how far each pixel is, follow exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch.nn import functional as F

from ssl_vit.common.errors import check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.common.seeds import fold, generator
from ssl_vit.data.decode import decode
from ssl_vit.data.sources import Source, open_source

ANNOTATIONS = "annotations.json"
DEPTH_SCALE = 0.001
"""Depth of one step of a depth map: a thousandth of the camera's height above the floor."""

_NEAR = 1.2
_MOST = 254  # classes: 0 is the background, and 255 of masks often no class
_TRIES = 4
_LEAST_SEEN = 0.4
_LEAST_PIXELS = 30
# Ink of images smaller than this, as scikit-learn's digits, which have no background of their own.
_TINY = 16
_INK = 0.35


@dataclass(frozen=True)
class Scene:
    """Scene: an image with all that is in it.

    ``image``: (S, S, 3). ``depth``: (S, S) in heights of the camera. ``visible``: of each of n
    objects the pixels where it is seen. ``classes``: (n,) from 0.
    """

    image: UInt8[np.ndarray, "s s 3"]
    depth: Float[np.ndarray, "s s"]
    visible: Bool[np.ndarray, "n s s"]
    classes: Int[np.ndarray, " n"]

    def mask(self) -> UInt8[np.ndarray, "s s"]:
        """Class of each pixel: 0 where no object is, else its class + 1."""
        mask = np.zeros(self.depth.shape, np.uint8)
        for seen, kind in zip(self.visible, self.classes, strict=True):
            mask[seen] = kind + 1
        return mask


@dataclass(frozen=True)
class Studio:
    """Studio: pictures of objects and of surfaces, from which scenes of ``size`` pixels are made.

    ``objects`` must have labels; each scene has up to ``most`` of them.
    """

    objects: Source
    surfaces: Source | None
    size: int
    most: int
    seed: int

    def scene(self, i: int) -> Scene:
        """Scene i, a function of the seed and i alone."""
        rng = generator(fold(self.seed, i))
        size = self.size
        horizon = size * rng.uniform(0.2, 0.45)
        back = rng.uniform(3.0, 6.0)  # distance of the wall
        image, depth = self._room(rng, horizon, back)
        owner = np.full((size, size), -1)
        placed: list[int] = []
        distances = np.exp(
            rng.uniform(np.log(_NEAR), np.log(back), int(rng.integers(1, self.most + 1)))
        )
        for distance in sorted(distances, reverse=True):  # the nearer hides the further
            for _ in range(_TRIES):
                which = int(rng.integers(len(self.objects)))
                raw, label = self.objects.read(which)
                colours, opaque = _picture(decode(raw, 3).numpy(), rng, size, distance)
                corner = _corner(rng, colours.shape[:2], size, horizon, distance)
                covered = _put(opaque, corner, size)
                if covered.sum() < _LEAST_PIXELS or _hides(covered, owner, placed):
                    continue
                top, left = corner
                rows, columns = covered.nonzero()
                image[rows, columns] = colours[rows - top, columns - left]
                depth[covered], owner[covered] = distance, len(placed)
                placed.append(int(label or 0))
                break
        seen = np.stack([owner == n for n in range(len(placed))]) if placed else None
        none = np.zeros((0, size, size), dtype=bool)
        kinds = np.array(placed, dtype=np.int64)
        return Scene(image, depth.astype(np.float32), none if seen is None else seen, kinds)

    def _room(
        self, rng: np.random.Generator, horizon: float, back: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Wall and floor: colours (S, S, 3) uint8, and depths (S, S)."""
        size = self.size
        rows, columns = np.mgrid[0:size, 0:size] + 0.5
        below = np.maximum(rows - horizon, 1e-6)
        depth = np.minimum(size / below, back)
        across = (columns - size / 2) * depth / size
        floor = _look_up(self._surface(rng), across / 4, depth / 4)
        wall = _look_up(self._surface(rng), across / 8, (rows - horizon) * back / size / 8)
        image = np.where((depth < back)[:, :, None], floor, wall)
        return image.round().astype(np.uint8), depth

    def _surface(self, rng: np.random.Generator) -> Float[np.ndarray, "h w 3"]:
        """Picture of a surface, 0 to 255; without a source a pattern of coloured patches."""
        if self.surfaces is None:
            coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 12, 12)).astype(np.float32))
            fine = F.interpolate(coarse, size=(96, 96), mode="bicubic").clamp(0, 255)
            return fine[0].permute(1, 2, 0).numpy()
        raw, _ = self.surfaces.read(int(rng.integers(len(self.surfaces))))
        return decode(raw, 3).numpy().transpose(1, 2, 0).astype(np.float32)


def _look_up(
    picture: Float[np.ndarray, "h w 3"], across: np.ndarray, down: np.ndarray
) -> Float[np.ndarray, "s s 3"]:
    """Colours at places of a picture that is one unit wide and repeats, mirrored."""
    grid = torch.from_numpy(np.stack([across, down], axis=2).astype(np.float32))[None] * 2
    source = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]
    found = F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)
    return found[0].permute(1, 2, 0).numpy()


def _picture(
    pixels: UInt8[np.ndarray, "3 h w"], rng: np.random.Generator, size: int, distance: float
) -> tuple[UInt8[np.ndarray, "p q 3"], Bool[np.ndarray, "p q"]]:
    """Object as it is seen from a distance: colours, and which pixels are its own.

    Images without a background (of digits) are inked in a colour; of others a rounded square is
    cut out.
    """
    tall = max(4, round(size * rng.uniform(0.35, 0.8) / distance))
    image = torch.from_numpy(pixels)[None].float()
    new = F.interpolate(image, size=(tall, tall), mode="bilinear", antialias=True)[0]
    colours = new.permute(1, 2, 0).numpy()
    if pixels.shape[1] <= _TINY:
        opaque = colours[:, :, 0] > _INK * pixels.max()
        colours = np.broadcast_to(rng.uniform(0, 255, 3), colours.shape)
    else:
        axis = (np.arange(tall) + 0.5) / tall * 2 - 1
        opaque = axis[:, None] ** 4 + axis[None] ** 4 <= 1
    return colours.round().astype(np.uint8), opaque


def _corner(
    rng: np.random.Generator, shape: tuple[int, ...], size: int, horizon: float, distance: float
) -> tuple[int, int]:
    """Top left pixel of an object that stands on the floor at a distance."""
    bottom = horizon + size / distance
    return round(bottom) - shape[0], int(rng.integers(-shape[1] // 3, size - shape[1] * 2 // 3 + 1))


def _put(
    opaque: Bool[np.ndarray, "p q"], corner: tuple[int, int], size: int
) -> Bool[np.ndarray, "s s"]:
    """Pixels of the image that an object at ``corner`` covers."""
    covered = np.zeros((size, size), dtype=bool)
    rows, columns = (places + start for places, start in zip(opaque.nonzero(), corner, strict=True))
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    covered[rows[inside], columns[inside]] = True
    return covered


def _hides(covered: Bool[np.ndarray, "s s"], owner: np.ndarray, placed: Sequence[int]) -> bool:
    """True if an object would leave too little of another visible."""
    for n in range(len(placed)):
        before = owner == n
        left = (before & ~covered).sum()
        if left < max(_LEAST_PIXELS, _LEAST_SEEN * before.sum()):
            return True
    return False


def run_lengths(mask: Bool[np.ndarray, "h w"]) -> list[int]:
    """COCO's uncompressed run lengths: of 0 and 1 in turn, column by column, 0 first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = [0, *changes.tolist(), len(flat)]
    runs = np.diff(ends).tolist()
    return [0, *runs] if flat[0] else runs


def write_scenes(studio: Studio, count: int, out: Path, names: Sequence[str]) -> None:
    """Write ``count`` scenes: images/, masks/, depth/ (16 bit, in ``DEPTH_SCALE``),
    annotations.json (COCO), and classes.txt beside the masks.

    Raises:
        UserError: the folder holds something already.
    """
    check(
        not out.exists() or not any(out.iterdir()),
        f"--out is {str(out)!r}, which is not empty; name a new folder",
    )
    for folder in ("images", "masks", "depth"):
        (out / folder).mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        made = pool.map(partial(_write, studio, out), range(count))
        annotations = [dict(a) for several in made for a in several]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    sides = {"height": studio.size, "width": studio.size}
    images = [{"id": i, "file_name": f"{i:06d}.png"} | sides for i in range(count)]
    kinds = [{"id": n + 1, "name": name} for n, name in enumerate(names)]
    whole = {"images": images, "annotations": annotations, "categories": kinds}
    write_text_atomically(out / ANNOTATIONS, json.dumps(whole))
    write_text_atomically(out / "classes.txt", "\n".join(["background", *names]) + "\n")


def _write(studio: Studio, out: Path, i: int) -> list[dict[str, object]]:
    """Write the files of a scene; its annotations."""
    scene, name = studio.scene(i), f"{i:06d}.png"
    Image.fromarray(scene.image).save(out / "images" / name)
    Image.fromarray(scene.mask()).save(out / "masks" / name)
    steps = (scene.depth / DEPTH_SCALE).round().astype(np.uint16)
    Image.fromarray(steps).save(out / "depth" / name)
    return [
        _annotation(i, seen, int(kind))
        for seen, kind in zip(scene.visible, scene.classes, strict=True)
    ]


def _annotation(image: int, seen: Bool[np.ndarray, "s s"], kind: int) -> dict[str, object]:
    """COCO's annotation of what is seen of an object, without its id."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "image_id": image,
        "category_id": kind + 1,
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(seen.sum()),
        "iscrowd": 0,
        "segmentation": {"counts": run_lengths(seen), "size": list(seen.shape)},
    }


def open_studio(objects: str, surfaces: str, size: int, most: int, seed: int) -> Studio:
    """Studio of two sources of images; ``surfaces`` may be empty.

    Raises:
        UserError: the objects have no labels.
    """
    source = open_source(objects)
    known = source.labels is not None and bool((source.labels >= 0).all())
    check(known, f"--objects is {objects!r}, whose images have no labels; name images of classes")
    assert source.labels is not None
    count = int(source.labels.max()) + 1
    check(
        count <= _MOST, f"--objects is {objects!r} of {count} classes; masks have {_MOST} at most"
    )
    return Studio(source, open_source(surfaces) if surfaces else None, size, most, seed)


def class_names(studio: Studio) -> tuple[str, ...]:
    """Names of the objects' classes."""
    labels = studio.objects.labels
    assert labels is not None
    return studio.objects.classes or tuple(str(n) for n in range(int(labels.max()) + 1))
