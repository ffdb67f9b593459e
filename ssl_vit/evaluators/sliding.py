"""Sliding windows: class probabilities of whole images from windows, scales and mirror images."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.evaluators.patch_heads import upsampled

Logits = Callable[[Float[Tensor, "b k h w"]], Float[Tensor, "b c r s"]]
"""Logits of images of the encoder's size, at any resolution."""


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width times ``scale``, in whole pixels."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of windows that cover ``length``, evenly spaced, each sharing at least
    ``overlap`` of itself with the next one; of one window, 0."""
    if length <= window:
        return [0]
    last = length - window
    count = math.ceil(last / max(1.0, (1 - overlap) * window)) + 1
    return [round(i * last / (count - 1)) for i in range(count)]


class Sliding:
    """Sliding windows over images of one size.

    Each window is as large as the encoder's images. An image smaller than a window is filled up
    with zeros (the mean colour) at its lower right, which are not judged.
    """

    def __init__(
        self, size: tuple[int, int], window: tuple[int, int], overlap: float, flip: bool
    ) -> None:
        self.size, self.window, self.flip = size, window, flip
        starts = (window_starts(s, w, overlap) for s, w in zip(size, window, strict=True))
        self.places = list(product(*starts))

    def logits(self, images: Float[Tensor, "b k h w"], of: Logits) -> Float[Tensor, "n b c r s"]:
        """Logits of all windows, and of their mirror images turned back, at the resolution of
        ``of``; the windows of ``places`` first."""
        height, width = self.window
        right, below = max(0, width - self.size[1]), max(0, height - self.size[0])
        filled = F.pad(images, (0, right, 0, below))
        windows = [filled[:, :, y : y + height, x : x + width] for y, x in self.places]
        made = [of(window) for window in windows]
        made += [of(window.flip(3)).flip(3) for window in windows if self.flip]
        return torch.stack(made)

    def probabilities(self, logits: Float[Tensor, "n c r s"]) -> Float[Tensor, "c h w"]:
        """Class probabilities of the pixels of one image: their mean over all windows with it.

        ``logits``: this image's of :meth:`logits`.
        """
        total = logits.new_zeros(logits.shape[1], *self.size)
        count = logits.new_zeros(self.size)
        for (y, x), coarse in zip(self.places * (1 + self.flip), logits, strict=True):
            fine = upsampled(coarse[None], self.window)[0].softmax(0)
            there = slice(y, y + self.window[0]), slice(x, x + self.window[1])
            rows, columns = count[there].shape
            total[:, *there] += fine[:, :rows, :columns]
            count[there] += 1
        return total / count
