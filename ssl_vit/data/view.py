"""Evaluation view: how images are prepared for a frozen encoder, and displayed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_vit.data.normalize import Normalize


@dataclass(frozen=True)
class View:
    """Evaluation view of an encoder: size in pixels, channels, crop, statistics."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def crop_ratio(self) -> float:
        """Crop ratio: share of the short side that the central crop covers, 224/256 as on ImageNet.

        Encoders below 112 pixels use the whole image, as theirs are small already.
        """
        return 0.875 if min(self.size) >= 112 else 1.0

    def display(self, images: Tensor) -> Normalize:
        """Display normalisation: its ``inverse`` maps normalised images to 0..1.

        8-bit images get their own values back. Deeper ones may have any range: the mean +- 2.5
        standard deviations is displayed.
        """
        if images.dtype == torch.uint8:
            return Normalize(self.mean, self.std)
        return Normalize((0.5,) * self.channels, (0.2,) * self.channels)
