"""Augmentation in two halves: workers crop uint8 images, the device normalises whole batches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from ssl_vit.common.schedules import Length
from ssl_vit.data.decode import BadImage
from ssl_vit.data.levels import Levels
from ssl_vit.data.missing import has_missing, resized, valid_share
from ssl_vit.data.order import Places
from ssl_vit.data.photometric import Photometric
from ssl_vit.data.policy import Policy

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Draw = Callable[[np.random.Generator], dict[str, np.ndarray]]
"""Draws for one sample in the workers, by name: arrays of fixed shapes."""
DrawTogether = Callable[[Places], dict[str, np.ndarray]]
"""Draws in the workers for images of a step together, by name."""

# A crop of which less has data is drawn again, this many times at most.
_LEAST_DATA, _DRAWS = 0.1, 10


class DrawnCrop(NamedTuple):
    """A crop with what was drawn for it.

    ``photometric``: its photometric parameters, ``WIDTH`` of them or none, and ``LEVELS_WIDTH``
    more where it has levels. ``place``: top, left, height and width of its box as shares of the
    image's sides, and 1 if it is flipped (2: upside down, 3: both ways), plus 4 for each quarter
    turn counter-clockwise after that.
    ``missing``: whether any of its pixels is (NaN).
    """

    crop: Tensor
    photometric: list[float]
    place: tuple[float, ...]
    missing: bool = False


@dataclass(frozen=True)
class Crop:
    """``count`` random resized crops of ``size`` (height, width) pixels.

    ``scale``: least and most share of the area; ``ratio``: least and most width over height, drawn
    log-uniformly, or, if ``relative``, that as a factor of the image's own; ``flip``,
    ``vertical_flip``: probability of a horizontal and of a vertical flip; ``photometric``: what is
    done to its colours and sharpness, if anything; ``policy``: what is done to it before that, in
    the workers; ``levels``: what is done to it once it is normalised.
    ``quarter_turns``: probability of a turn by one, two or three quarters, each as likely, after
    the flips. The box and its ratio are the image's; turned by one or three, it is resized to
    (width, height), so that it is stretched no more than the others and no pixel interpolated
    twice.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    count: int = 1
    photometric: Photometric | None = None
    policy: Policy | None = None
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0
    levels: Levels | None = None
    relative: bool = False


@dataclass(frozen=True)
class ViewSpec:
    """The crops a method wants of each image, and what else it wants drawn for it.

    ``draw``: called with a generator that is a function of (seed, epoch, image); its arrays arrive
    stacked as ``Views.drawn``. ``draw_together``: called with the images' places in their step; its
    arrays arrive beside them, as they are. ``phases``: parts of the training that come before, in
    their order.
    """

    crops: tuple[Crop, ...]
    draw: Draw | None = None
    draw_together: DrawTogether | None = None
    phases: tuple[Phase, ...] = ()

    def at(self, step: int, steps_per_epoch: int) -> ViewSpec:
        """Views at a step, counted from 0: those of the first phase not yet over, else these."""
        running = (p for p in self.phases if step < p.until.steps(steps_per_epoch))
        return next((phase.spec for phase in running), self)

    @property
    def last(self) -> ViewSpec:
        """Views after all phases."""
        return replace(self, phases=())


def one_crop(size: tuple[int, int], options: Any, policy: Policy | None = None) -> ViewSpec:
    """One random resized crop, perhaps flipped and turned; its colours stay as they are, but for
    what a ``policy`` does.

    ``size``: height and width in pixels. ``options``: of a method or of fine-tuning, with
    ``crop_scale``, ``flip``, ``vertical_flip`` and ``quarter_turns``.
    """
    crop = Crop(
        size,
        scale=options.crop_scale,
        flip=options.flip,
        policy=policy,
        vertical_flip=options.vertical_flip,
        quarter_turns=options.quarter_turns,
    )
    return ViewSpec((crop,))


@dataclass(frozen=True)
class Phase:
    """First part of a training, with other crops: up to ``until``, counted from the beginning.

    ``size``: of the images that the encoder sees, in pixels.
    """

    until: Length
    size: tuple[int, int]
    spec: ViewSpec


def crop_box(height: int, width: int, crop: Crop, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, in pixels (Szegedy et al. 2015, section 6).

    Area and aspect ratio are drawn until the box fits, at most ten times; then the largest central
    box of an allowed ratio is taken. The distribution is torchvision's ``RandomResizedCrop``.
    """
    own = width / height if crop.relative else 1.0
    least, most = (own * ratio for ratio in crop.ratio)
    log_ratio = (math.log(least), math.log(most))
    for _ in range(10):
        area = height * width * rng.uniform(*crop.scale)
        ratio = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, round(height * most))
    h = min(height, round(width / least))
    return (height - h) // 2, (width - w) // 2, h, w


class Cut(NamedTuple):
    """Draws for one crop.

    ``box``: (top, left, height, width) in pixels; ``flip``: whether it is mirrored; ``key``: what
    its policy draws from; ``photometric``, ``place``: as in :class:`DrawnCrop`, whatever share of
    the image is decoded; ``vertical_flip``: whether it is upside down; ``turns``: by how many
    quarters it is turned counter-clockwise.
    """

    box: tuple[int, int, int, int]
    flip: bool
    key: int
    photometric: list[float]
    place: tuple[float, ...]
    vertical_flip: bool = False
    turns: int = 0

    def size(self, crop: Crop) -> tuple[int, int]:
        """Height and width of the crop before it is turned."""
        height, width = crop.size
        return (width, height) if self.turns % 2 else (height, width)


def draw_views(
    height: int, width: int, spec: ViewSpec, rng: random.Random, policies: bool
) -> list[list[Cut]]:
    """Parameters drawn for the crops of one image, by kind of crop.

    ``policies``: whether the image is one that a policy can be applied to.
    """

    return [
        [draw_cut(height, width, crop, rng, policies) for _ in range(crop.count)]
        for crop in spec.crops
    ]


def draw_cut(height: int, width: int, crop: Crop, rng: random.Random, policies: bool) -> Cut:
    """Parameters drawn for one crop; ``policies`` as for :func:`draw_views`.

    An operation that is off draws nothing, and each is drawn after those that were there before it.
    """
    box, flip = crop_box(height, width, crop, rng), rng.random() < crop.flip
    key = rng.getrandbits(63) if crop.policy and policies else 0
    colours = crop.photometric.draw(rng) if crop.photometric else []
    vertical = crop.vertical_flip > 0 and rng.random() < crop.vertical_flip
    turned = crop.quarter_turns > 0 and rng.random() < crop.quarter_turns
    turns = rng.randint(1, 3) if turned else 0
    if crop.levels and crop.levels.on:
        colours = [*(colours or Photometric().draw(rng)), *crop.levels.draw(rng)]
    top, left, h, w = box
    way = float(flip + 2 * vertical + 4 * turns)
    place = top / height, left / width, h / height, w / width, way
    return Cut(box, flip, key, colours, place, vertical, turns)


def cut_out(image: Tensor, crop: Crop, cut: Cut, missing: bool = False) -> Tensor:
    """The crop of a (C, H, W) image that was drawn, without its photometric operations.

    It is resized bicubically, antialiased (uint8 stays so), flipped after that, then turned, and
    what its policy says is done last. ``missing``: whether pixels of the image may be.
    """
    top, left, height, width = cut.box
    part = image[:, top : top + height, left : left + width]
    image = resized(part, cut.size(crop), None if missing else False)
    image = image.flip(-1) if cut.flip else image
    image = image.flip(-2) if cut.vertical_flip else image
    image = image.rot90(cut.turns, (-2, -1)) if cut.turns else image
    if crop.policy is None or not crop.policy.applies(image):
        return image
    return crop.policy(image, cut.key)


def take_views(image: Tensor, spec: ViewSpec, rng: random.Random) -> list[list[DrawnCrop]]:
    """The workers' half: for each kind of crop its crops of this image, all parameters drawn.

    Raises:
        BadImage: so many pixels are missing that a crop holds nothing.
    """
    height, width = image.shape[1:]
    drawn = draw_views(height, width, spec, rng, policies=Policy.applies(image))
    if not has_missing(image):
        return cut_views(image, spec, drawn)
    if not valid_share(image):
        raise BadImage("holds no data")
    return [
        [_with_data(image, crop, cut, rng) for cut in cuts]
        for crop, cuts in zip(spec.crops, drawn, strict=True)
    ]


def _with_data(image: Tensor, crop: Crop, cut: Cut, rng: random.Random) -> DrawnCrop:
    """The crop that was drawn or, if hardly any of it has data, the next one that has; if none of
    some has, the one that has most.

    Raises:
        BadImage: none of them holds anything.
    """
    height, width = image.shape[1:]
    best, most = None, 0.0
    for _ in range(_DRAWS):
        made = cut_out(image, crop, cut, missing=True)
        share = valid_share(made)
        if share > most:
            best, most = DrawnCrop(made, cut.photometric, cut.place, has_missing(made)), share
        if share >= _LEAST_DATA:
            break
        cut = draw_cut(height, width, crop, rng, policies=False)
    if best is None:
        has = f"holds data in {100 * valid_share(image):.2g} % of its pixels"
        raise BadImage(f"{has}, and none of {_DRAWS} crops of it holds any")
    return best


def cut_views(image: Tensor, spec: ViewSpec, drawn: list[list[Cut]]) -> list[list[DrawnCrop]]:
    """The crops of an image that were drawn."""
    return [
        [DrawnCrop(cut_out(image, crop, cut), cut.photometric, cut.place) for cut in cuts]
        for crop, cuts in zip(spec.crops, drawn, strict=True)
    ]


def center_view(image: Tensor, size: tuple[int, int], crop_ratio: float) -> Tensor:
    """The evaluation crop: a central ``size`` that covers ``crop_ratio`` of the short side.

    Height and width are scaled together, by the least factor that lets the crop fit.
    """
    height, width = image.shape[1:]
    factor = max(size[0] / height, size[1] / width) / crop_ratio
    scaled = max(size[0], round(height * factor)), max(size[1], round(width * factor))
    return tvf.center_crop(resized(image, scaled), list(size))
