"""Batches of images with objects: jittered for training, whole for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.common.task import Views
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Source
from ssl_vit.data.batch import Batch, stack
from ssl_vit.data.coco import coco_of
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.eval_images import EvalImages
from ssl_vit.data.jitter import Jitter, draw_placement, fitted, place, place_image
from ssl_vit.data.loader import TrainImages
from ssl_vit.data.missing import with_data

_LEAST = 1.0  # pixels of a side of a box that is learned from


class Sample(NamedTuple):
    """Image in its frame, with k objects.

    ``missing``: True outside of the image. ``masks``: each row of pixels packed into bits, eight
    a byte; k x h x 0 where there are none.
    """

    image: Tensor
    padding: Bool[Tensor, "h w"]
    boxes: Float[Tensor, "k 4"]
    classes: Int64[Tensor, " k"]
    masks: UInt8[Tensor, "k h bytes"]


class JitteredObjects(TrainImages):
    """Training images with their objects, placed by large-scale jitter, a function of (seed, epoch,
    index).

    ``Views.drawn`` of a batch of B images has ``count`` (B,), and of all their K objects in a row
    ``boxes`` (K, 4; left, top, right, bottom in pixels), ``classes`` (K,; from 0) and, if asked
    for, ``masks`` (K, h, w / 8; :func:`unpacked`).
    """

    def __init__(
        self, source: Source, jitter: Jitter, channels: int, seed: int, masks: bool
    ) -> None:
        spec = ViewSpec((Crop(jitter.size, flip=jitter.flip),))
        super().__init__(source, spec, channels, seed)
        self.jitter, self.masks = jitter, masks
        self.coco, self.rows = coco_of(source, "--data.train")

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (epoch, index) pairs."""
        bad: dict[int, str] = {}
        samples, keys = [], []
        for epoch, index in wanted:
            key = fold(self.seed, epoch, index)
            samples.append(self.replaced(index, partial(self.sample, key=key), bad, set()))
            keys.append(fold(key))
        images = stack([s.image for s in samples])
        drawn = {
            "count": torch.tensor([len(s.boxes) for s in samples]),
            "boxes": torch.cat([s.boxes for s in samples]),
            "classes": torch.cat([s.classes for s in samples]),
        }
        if self.masks:
            drawn["masks"] = torch.cat([s.masks for s in samples])
        missing = missing_of(images, [s.padding for s in samples])
        none = torch.full((len(keys),), -1)
        views = Views(
            [images], torch.tensor(keys), none, key=fold(*keys), drawn=drawn, missing=missing
        )
        return Batch(views, bad)

    def sample(self, index: int, key: int) -> Sample:
        """The image at ``index``, placed as ``key`` says.

        Raises:
            BadImage: it cannot be read.
        """
        image = sized(self.source, index, self.channels)
        inner = int(self.rows[index])
        objects = self.coco.objects(inner)
        height, width = image.shape[1:]
        at = draw_placement((height, width), self.jitter, key)
        maps = {}
        if self.masks:
            maps["masks"] = torch.from_numpy(self.coco.masks(inner, objects.rows))
        placed = place(image, maps, torch.from_numpy(objects.boxes), at)
        boxes, masks = placed.boxes, placed.maps.get("masks")
        if masks is not None:  # what is left of an object may be smaller than what is of its box
            boxes = mask_boxes(masks)
        keep = ((boxes[:, 2:] - boxes[:, :2]) >= _LEAST).all(1)
        packed = torch.zeros((int(keep.sum()), at.frame[0], 0), dtype=torch.uint8)
        if masks is not None:
            packed = torch.from_numpy(np.packbits(masks[keep].numpy(), axis=-1))
        classes = torch.from_numpy(objects.numbers)[keep]
        return Sample(placed.image, at.padding, boxes[keep], classes, packed)


def sized(source: Source, index: int, channels: int) -> Tensor:
    """Decoded image (C, H, W) of a COCO source, of the size that its annotations are for.

    Raises:
        BadImage: it cannot be read.
        UserError: it is of another size.
    """
    coco, rows = coco_of(source, "the source")
    image = with_data(decode(source.read(index)[0], channels, source.reading))
    own, stated = tuple(image.shape[1:]), tuple(coco.sizes[rows[index]].tolist())
    check(
        own == stated,
        f"{source.name(index)} has {own[0]}x{own[1]} pixels, its annotations are for "
        f"{stated[0]}x{stated[1]} (rows x columns); they must agree",
    )
    return image


def missing_of(images: Tensor, padding: Sequence[Bool[Tensor, "h w"]]) -> list[Tensor]:
    """``Views.missing`` of padded images; empty where nothing is missing."""
    outside = torch.stack(list(padding))[:, None].expand(images.shape)
    missing = outside | images.isnan() if images.is_floating_point() else outside
    return [missing.contiguous()] if bool(missing.any()) else []


def mask_boxes(masks: UInt8[Tensor, "k h w"]) -> Float[Tensor, "k 4"]:
    """Boxes around the pixels of masks, in pixels' outer edges; 0 of empty ones."""
    boxes = torch.zeros(len(masks), 4)
    for box, mask in zip(boxes, masks.bool(), strict=True):
        rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
        if len(rows):
            edges = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            box[:] = torch.stack(edges).float()
    return boxes


def unpacked(masks: UInt8[Tensor, "k h bytes"], width: int) -> UInt8[Tensor, "k h w"]:
    """Masks of which eight pixels of a row were packed into a byte, the first into its highest
    bit."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return ((masks[..., None] >> shifts) & 1).flatten(-2)[..., :width]


class WholeImages(EvalImages):
    """Whole images for evaluation, each as large as fits into a frame of ``size``.

    ``Views.drawn`` has their ``scaled`` and ``original`` heights and widths, (B, 2) each.
    """

    def __init__(self, source: Source, size: tuple[int, int], channels: int) -> None:
        super().__init__(source, size, 1.0, channels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these images; unreadable ones are skipped and reported."""
        bad: dict[int, str] = {}
        images, keys = [], []
        for index in indices:
            try:
                images.append(sized(self.source, index, self.channels))
                keys.append(index)
            except BadImage as error:
                bad[index] = f"{self.source.name(index)}: {error}"
        return Batch(framed_whole(images, keys, self.size), bad)


def framed_whole(images: Sequence[Tensor], keys: Sequence[int], size: tuple[int, int]) -> Views:
    """Views of whole images (C, H, W), as :class:`WholeImages` has them; without crops of none."""
    numbers, labels = torch.tensor(list(keys)).long(), torch.full((len(keys),), -1)
    if not images:
        return Views([], numbers, labels)
    places = [fitted((image.shape[1], image.shape[2]), size) for image in images]
    made = stack([place_image(image, at) for image, at in zip(images, places, strict=True)])
    drawn = {
        "scaled": torch.tensor([p.scaled for p in places]),
        "original": torch.tensor([p.image for p in places]),
    }
    missing = missing_of(made, [p.padding for p in places])
    return Views([made], numbers, labels, drawn=drawn, missing=missing)
