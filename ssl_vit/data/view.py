"""How images are prepared for a frozen encoder, and shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_vit.data.augment import Normalize


@dataclass(frozen=True)
class View:
    """How images are prepared for an encoder: size in pixels, channels, crop, statistics."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def crop_ratio(self) -> float:
        """Share of the short side the central crop covers: 224/256, the custom on ImageNet.

        Encoders of less than 112 pixels see the whole image: theirs are small pictures already.
        """
        return 0.875 if min(self.size) >= 112 else 1.0

    def display(self, images: Tensor) -> Normalize:
        """How to show such images: its ``inverse`` takes normalised ones to 0..1.

        8-bit images get their own values back. Of deeper ones any range is possible: shown is the
        mean +- 2.5 standard deviations.
        """
        if images.dtype == torch.uint8:
            return Normalize(self.mean, self.std)
        return Normalize((0.5,) * self.channels, (0.2,) * self.channels)
