"""Context and target blocks: what an encoder sees of an image, and what is predicted of it, drawn
in the workers (Assran et al. 2023, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool

from ssl_vit.common.seeds import fold, generator
from ssl_vit.data.order import Places

# Steps in which the number goes from 0 to 1 that decides a block's size: the largest is then known.
_LEVELS = 64
# The share of images that have fewer context patches than are kept, and are drawn anew.
_SHORT = 0.02
# Images from which that number is found, sizes among them; and attempts to draw an image anew.
_SIZES, _IMAGES, _ATTEMPTS = 128, 32, 20


@dataclass(frozen=True)
class ContextBlocks:
    """One context block and several target blocks of each image, of sizes that a step's images
    share; from the context is taken out what a target block covers.

    One number from 0 to 1 sets both area and aspect ratio of the target blocks of a step; another
    one the area of the context block, a square. Each block has a place of its own, anywhere.

    The original keeps of each context as many patches as the one of the batch has that has fewest,
    the first ones, row by row; so does this, but the number is the same at every step: all but one
    image in fifty, over all sizes, have as many. An image with fewer is drawn again.

    Attributes:
        grid: rows and columns of an image's patches.
        targets: target blocks of an image.
        target_scale: their share of the image, least and most.
        target_aspect: their height over their width in patches, least and most.
        context_scale: share of the image of the context block, least and most.
    """

    grid: tuple[int, int]
    targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)

    def draw(self, places: Places) -> dict[str, np.ndarray]:
        """Blocks of some images of a step.

        ``context``: (count, K) patches that the encoder sees, in order. ``targets``: (count, T, M)
        patches of each target block, row by row, and then 0, for padding. ``inside``: (M,) False
        for padding. K and M are those of ``kept`` and ``most``.
        """
        rng = generator(fold(places.key))
        target = self.target_size(int(rng.integers(_LEVELS)))
        context = self.context_size(int(rng.integers(_LEVELS)))
        size, most = target[0] * target[1], self.most
        shown = np.empty((places.count, self.kept), dtype=np.int64)
        hidden = np.zeros((places.count, self.targets, most), dtype=np.int64)
        for i in range(places.count):
            own = generator(fold(places.key, places.start + i))
            seen, blocks = self._image(target, context, own)
            shown[i] = np.flatnonzero(seen)[: self.kept]
            hidden[i, :, :size] = np.nonzero(blocks)[1].reshape(self.targets, size)
        return {"context": shown, "targets": hidden, "inside": np.arange(most) < size}

    @property
    def kept(self) -> int:
        """Context patches of an image; below 1 where a context block may have none."""
        return _counts(self)[0]

    @property
    def most(self) -> int:
        """Patches of the largest target block."""
        return _counts(self)[1]

    def target_size(self, level: int) -> tuple[int, int]:
        """Rows and columns of a target block; ``level``: from 0 to 63, for both area and aspect."""
        share = level / (_LEVELS - 1)
        return self._size(_between(self.target_scale, share), _between(self.target_aspect, share))

    def context_size(self, level: int) -> tuple[int, int]:
        """Rows and columns of a context block."""
        return self._size(_between(self.context_scale, level / (_LEVELS - 1)), 1.0)

    def _size(self, scale: float, aspect: float) -> tuple[int, int]:
        rows, cols = self.grid
        area = scale * rows * cols
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        return min(rows, max(1, height)), min(cols, max(1, width))

    def _image(
        self, target: tuple[int, int], context: tuple[int, int], rng: np.random.Generator
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, "t n"]]:
        """The context of an image, ``kept`` patches or more, and its target blocks."""
        for _ in range(_ATTEMPTS):
            blocks, block = self._place(target, self.targets, rng), self._place(context, 1, rng)[0]
            seen = block & ~blocks.any(0)
            if seen.sum() >= self.kept:
                return seen, blocks
        # Target blocks in one place leave enough.
        blocks = blocks[:1].repeat(self.targets, axis=0)
        return block & ~blocks[0], blocks

    def _place(
        self, size: tuple[int, int], count: int, rng: np.random.Generator
    ) -> Bool[np.ndarray, "count n"]:
        """Masks of so many blocks of this size, each anywhere in the grid: True where it covers a
        patch."""
        inside = []
        for side, length in zip(self.grid, size, strict=True):
            start, all_places = rng.integers(side - length + 1, size=(count, 1)), np.arange(side)
            inside.append((all_places >= start) & (all_places < start + length))
        return (inside[0][:, :, None] & inside[1][:, None, :]).reshape(count, -1)

    def _left(self, level: int, rng: np.random.Generator, images: int) -> np.ndarray:
        """Patches left of the context of so many images."""
        blocks = self._place(self.target_size(level), images * self.targets, rng)
        covered = blocks.reshape(images, self.targets, -1).any(1)
        context = self.context_size(int(rng.integers(_LEVELS)))
        left: np.ndarray = (self._place(context, images, rng) & ~covered).sum(1)
        return left


@lru_cache(maxsize=16)
def _counts(blocks: ContextBlocks) -> tuple[int, int]:
    """Context patches to keep, and patches of the largest target block."""
    rng = generator(0)
    left = [blocks._left(i * _LEVELS // _SIZES, rng, _IMAGES) for i in range(_SIZES)]
    most = max(math.prod(blocks.target_size(level)) for level in range(_LEVELS))
    sure = min(math.prod(blocks.context_size(level)) for level in range(_LEVELS)) - most
    usual = int(np.quantile(np.concatenate(left), _SHORT, method="lower"))
    return min(usual, sure), most


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + share * (bounds[1] - bounds[0])
