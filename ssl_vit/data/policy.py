"""RandAugment in the workers: timm's, on 8-bit crops."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.seeds import seeded

_NOTATION = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)[\d.]+|-t\w*)*")


@dataclass(frozen=True)
class Policy:
    """RandAugment policy (Cubuk et al. 2020), timm's implementation.

    ``text``: in timm's notation, ``rand-m9-mstd0.5-inc1``: magnitude 9 of 10 with a standard
    deviation of .5, operations that grow with it. ``mean``: of the data set, by channel, images
    scaled to 0..1; it fills uncovered areas.

    Raises:
        UserError: ``text`` is not in timm's notation.
    """

    text: str
    mean: tuple[float, ...]

    def __post_init__(self) -> None:
        message = f"RandAugment is {self.text!r}; allowed: timm's notation, rand-m9-mstd0.5-inc1"
        # timm ignores unknown parts.
        check(_NOTATION.fullmatch(self.text) is not None, message)
        try:
            _transform(self.text, self.mean, 1)
        except ValueError:
            raise UserError(message) from None

    @staticmethod
    def applies(image: Tensor) -> bool:
        """True if it applies to a (C, H, W) image: 8-bit, of 1 or 3 channels."""
        return image.dtype == torch.uint8 and image.shape[0] in (1, 3)

    def __call__(self, image: UInt8[Tensor, "c h w"], key: int) -> UInt8[Tensor, "c h w"]:
        """Augment an image; operations and strengths follow from ``key``."""
        gray = image.shape[0] == 1
        pixels = image[0] if gray else image.permute(1, 2, 0)
        transform = _transform(self.text, self.mean, min(image.shape[1:]))
        with seeded(key):
            changed = np.array(transform(Image.fromarray(pixels.contiguous().numpy())))
        made = torch.from_numpy(changed)
        return made[None] if gray else made.permute(2, 0, 1).contiguous()


@cache
def _transform(text: str, mean: tuple[float, ...], side: int) -> RandAugment:
    """RandAugment with the parameters of timm's ``create_transform`` for ``side`` pixels."""
    parameters = {
        "translate_const": int(side * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(text, parameters)
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **rest: Any) -> Image.Image:
    """Posterise; timm uses 0 bits at full magnitude, which Pillow 13 refuses (before: black)."""
    return posterize(image, bits, **rest) if bits else Image.new(image.mode, image.size)
