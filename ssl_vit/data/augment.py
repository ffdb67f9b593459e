"""Augmentation in two halves: workers crop uint8 images, the device normalises whole batches."""

import math
import random
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from ssl_vit.data.photometric import Photometric, photometric
from ssl_vit.data.policy import Policy
from ssl_vit.task import Views

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BICUBIC = v2.InterpolationMode.BICUBIC

DrawnCrop = tuple[Tensor, list[float]]
"""A crop, and its photometric parameters: ``WIDTH`` of them, or none."""


@dataclass(frozen=True)
class Crop:
    """``count`` random resized crops of ``size`` (height, width) pixels.

    ``scale``: least and most share of the area; ``ratio``: least and most width over height, drawn
    log-uniformly; ``flip``: probability of a horizontal flip; ``photometric``: what is done to its
    colours and sharpness, if anything; ``policy``: what is done to it before that, in the workers.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    count: int = 1
    photometric: Photometric | None = None
    policy: Policy | None = None


@dataclass(frozen=True)
class ViewSpec:
    """The crops a method wants of each image."""

    crops: tuple[Crop, ...]


def crop_box(height: int, width: int, crop: Crop, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, in pixels (Szegedy et al. 2015, section 6).

    Area and aspect ratio are drawn until the box fits, at most ten times; then the largest central
    box of an allowed ratio is taken. The distribution is torchvision's ``RandomResizedCrop``.
    """
    log_ratio = (math.log(crop.ratio[0]), math.log(crop.ratio[1]))
    for _ in range(10):
        area = height * width * rng.uniform(*crop.scale)
        ratio = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, round(height * crop.ratio[1]))
    h = min(height, round(width / crop.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(image: Tensor, crop: Crop, rng: random.Random) -> Tensor:
    """One random crop of a (C, H, W) image, resized bicubically, antialiased; uint8 stays so.

    It is flipped after that, and what its policy says is done last.
    """
    top, left, height, width = crop_box(image.shape[1], image.shape[2], crop, rng)
    image = image[:, top : top + height, left : left + width]
    if (height, width) != crop.size:
        image = tvf.resize(image, list(crop.size), interpolation=_BICUBIC, antialias=True)
    image = image.flip(-1) if rng.random() < crop.flip else image
    if crop.policy is None or not crop.policy.applies(image):
        return image
    return crop.policy(image, rng.getrandbits(63))


def take_views(image: Tensor, spec: ViewSpec, rng: random.Random) -> list[list[DrawnCrop]]:
    """The workers' half: for each kind of crop its crops of this image, all parameters drawn."""
    return [
        [
            (random_crop(image, crop, rng), crop.photometric.draw(rng) if crop.photometric else [])
            for _ in range(crop.count)
        ]
        for crop in spec.crops
    ]


def center_view(image: Tensor, size: tuple[int, int], crop_ratio: float) -> Tensor:
    """The evaluation crop: a central ``size`` that covers ``crop_ratio`` of the short side.

    Height and width are scaled together, by the least factor that lets the crop fit.
    """
    height, width = image.shape[1:]
    factor = max(size[0] / height, size[1] / width) / crop_ratio
    scaled = [max(size[0], round(height * factor)), max(size[1], round(width * factor))]
    if scaled != [height, width]:
        image = tvf.resize(image, scaled, interpolation=_BICUBIC, antialias=True)
    return tvf.center_crop(image, list(size))


class Normalize(nn.Module):
    """The device half: images as float, scaled to 0..1 where they are uint8, and standardised.

    Photometric operations, where a batch of views has parameters for them, come before the last.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], bounded: bool = True
    ) -> None:
        super().__init__()
        self.bounded = bounded
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def images(self, images: Tensor) -> Float[Tensor, "b c h w"]:
        """Normalised images from uint8 (0..255) or float ones."""
        return self._standardised(_scaled(images))

    def inverse(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalised images back to their own scale (0..1 for uint8)."""
        return images * self.std + self.mean

    def forward(self, views: Views) -> Views:
        """The same batch with its crops augmented, by what parameters there are, and normalised.

        ``bounded`` says whether the data set's images lie in 0..1, and have to stay there; it is no
        matter of a batch, where 8-bit images may meet deeper ones.
        """
        if not views.photometric:
            return replace(views, crops=[self.images(crop) for crop in views.crops])
        crops = []
        for images, parameters in zip(views.crops, views.photometric, strict=True):
            scaled = _scaled(images)
            if parameters.shape[1]:
                scaled = photometric(scaled, parameters, bounded=self.bounded)
            crops.append(self._standardised(scaled))
        return replace(views, crops=crops, photometric=[])

    def _standardised(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Overwrites ``images``: none of this is worth another pass over memory."""
        return images.sub_(self.mean).div_(self.std)


def _scaled(images: Tensor) -> Float[Tensor, "b c h w"]:
    """A float32 copy, in 0..1 if the images are uint8."""
    copy = images.to(torch.float32, copy=True)
    return copy.mul_(1 / 255) if images.dtype == torch.uint8 else copy
