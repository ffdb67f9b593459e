"""Reference augmentation chains: image preparation of other implementations, to compare with ours.

The original chain is written from its description (Caron et al. 2021, section 3.2 and appendix; He
et al. 2022, appendix A.1), with the libraries its authors used: PIL and torchvision.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from ssl_vit.common.errors import check
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.photometric import Photometric

_MODES = {1: "L", 3: "RGB"}


class OriginalChain:
    """Original chain: all crops are finished in the worker, by torchvision on PIL images.

    Args:
        spec: the crops, with their probabilities and strengths.
        channels: 3 or 1.
        mean: mean of each channel, images scaled to 0..1.
        std: standard deviation of each channel, on the same scale.

    Raises:
        UserError: another number of channels, or operations that it does not have.
    """

    name = "original"

    def __init__(
        self, spec: ViewSpec, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        check(
            channels in _MODES,
            f"--against {self.name} reads images by PIL, with 3 channels or 1; "
            f"--data.channels is {channels}",
        )
        others = any(c.quarter_turns or (c.levels and c.levels.on) for c in spec.crops)
        check(
            not others,
            f"--against {self.name} turns no crops, and has no levels, dropped channels or noise: "
            "give --data.preset natural",
        )
        self.mode = _MODES[channels]
        self.views = self._views(spec, mean, std)

    def _views(
        self, spec: ViewSpec, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Callable[[Image.Image], list[Tensor]]:
        """Function from an image to its crops."""
        last = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        crops: list[Callable[[Image.Image], Tensor]] = []
        for crop in spec.crops:
            crops += [transforms.Compose([*_operations(crop), *last])] * crop.count
        return _Each(crops)

    def open(self, raw: bytes | bytearray | np.ndarray) -> Image.Image:
        """Decoded image; an 8-bit array is used as it is.

        Raises:
            OSError: not an image, or a damaged one.
        """
        if isinstance(raw, np.ndarray):
            return Image.fromarray(raw).convert(self.mode)
        return Image.open(io.BytesIO(raw)).convert(self.mode)

    def __call__(self, raw: bytes | bytearray | np.ndarray) -> list[Tensor]:
        """Crops (C, h, w) of one image: float, normalised, in the order of the spec."""
        return self.views(self.open(raw))

    def batch(self, raws: Sequence[bytes | bytearray | np.ndarray]) -> list[Tensor]:
        """Batch as a worker returns it: one tensor (B, C, h, w) for each crop."""
        return [torch.stack(same) for same in zip(*map(self, raws), strict=True)]


@dataclass(frozen=True)
class _Each:
    """Crop list: all crops of one image."""

    crops: list[Callable[[Image.Image], Tensor]]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [crop(image) for crop in self.crops]


def _operations(crop: Crop) -> list[Any]:
    """Transforms of one crop, on PIL images."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return [
        transforms.RandomResizedCrop(crop.size, crop.scale, crop.ratio, interpolation=bicubic),
        transforms.RandomHorizontalFlip(crop.flip),
        transforms.RandomVerticalFlip(crop.vertical_flip),
        *(_colours(crop.photometric) if crop.photometric else []),
    ]


def _colours(p: Photometric) -> list[Any]:
    jitter = transforms.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)
    return [
        transforms.RandomApply([jitter], p=p.jitter),
        transforms.RandomGrayscale(p.gray),
        _Sometimes(p.blur, _Blur(p.blur_sigma)),
        _Sometimes(p.solarize, ImageOps.solarize),
    ]


@dataclass(frozen=True)
class _Blur:
    """Gaussian blur with a radius drawn uniformly from ``radii``."""

    radii: tuple[float, float]

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.radii)))


@dataclass(frozen=True)
class _Sometimes:
    """Random application: ``change`` with this probability."""

    probability: float
    change: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.change(image) if random.random() < self.probability else image
