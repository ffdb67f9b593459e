"""Images of a run: training and held-out sources, and pixel statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssl_vit.common.config import DataConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.labels import align_classes
from ssl_vit.data.order import permute
from ssl_vit.data.sources import Source, open_source, split_holdout


@dataclass
class Images:
    """Images of a run: training and held-out sources, and pixel statistics."""

    train: Source
    val: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]
    deep: bool
    """More than 8 bits per channel, so values have no fixed range."""

    @property
    def held_out(self) -> bool:
        """True if ``val`` is separate from ``train``; if nothing is held out they are the same."""
        return self.val is not self.train

    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint that detects a changed training set, JSON-serialisable."""
        return {"count": len(self.train), "mean": list(self.mean), "std": list(self.std)}


def open_images(data: DataConfig, seed: int) -> Images:
    """Open the sources of a run, split off held-out images, check channels, get statistics.

    Raises:
        UserError: sources that do not exist, or do not match the options or each other.
    """
    train = open_source(data.train, data)
    if data.val:
        val = open_source(data.val, data)
    else:
        rest, val = split_holdout(train, data.holdout, seed)
        train, val = (rest, val) if len(val) else (train, train)
    deep, _ = (is_deep(source, data.channels) for source in (train, val))
    val = val if val is train else align_classes(train, val)
    mean, std = data.mean, data.std
    if not mean and data.channels == 3 and data.statistics == "default":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif not mean:
        mean, std = estimate_statistics(train, data.channels, seed)
    return Images(train, val, mean, std, deep)


def is_deep(source: Source, channels: int) -> bool:
    """True if the first readable image has more than 8 bits per channel.

    Raises:
        UserError: it has other channels than asked for, or none of the first hundred is readable.
    """
    reason = ""
    for i in range(min(100, len(source))):
        try:
            return decode(source.read(i)[0], channels, source.reading).dtype != torch.uint8
        except BadImage as error:
            reason = reason or f"{source.name(i)}: {error}"
    raise UserError(f"no image of {source.spec} can be read, the first is {reason}")


def estimate_statistics(
    source: Source, channels: int, seed: int, count: int = 2000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Estimate the mean and standard deviation of each channel on ``count`` random images.

    Images weigh equally, independent of size; uint8 images are scaled to 0..1. Unreadable images
    are skipped.

    Raises:
        UserError: no image could be read, or a channel is constant.
    """
    picks = permute(np.arange(min(count, len(source)), dtype=np.int64), len(source), fold(seed))
    first, second, n = torch.zeros(channels).double(), torch.zeros(channels).double(), 0
    reason = ""
    for index in picks:
        try:
            image = decode(source.read(int(index))[0], channels, source.reading)
        except BadImage as error:
            reason = f"{source.name(int(index))}: {error}"
            continue
        pixels = image.double() / (255 if image.dtype == torch.uint8 else 1)
        first += pixels.mean((1, 2))
        second += pixels.square().mean((1, 2))
        n += 1
    if not n:
        raise UserError(f"none of {len(picks)} images of {source.spec} can be read: {reason}")
    mean = first / n
    std = (second / n - mean.square()).clamp(min=0).sqrt()
    if not (std > 1e-6).all():
        raise UserError(
            f"a channel of {source.spec} is constant (standard deviations {std.tolist()})"
        )
    return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in std.tolist())
