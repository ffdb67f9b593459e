"""Masks: which patches of an image are hidden, drawn in the workers, for an image or a batch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from ssl_vit.common.seeds import fold
from ssl_vit.data.order import Places, permute

# Patches of the smallest block, and its least height over width (Bao et al. 2022, algorithm 1).
_LEAST, _ASPECT = 4, 0.3
# Images among which as many crops are masked, so that parts of a batch have as much to do.
_GROUP = 8


def random_units(
    grid: tuple[int, int], unit: int, ratio: float, rng: np.random.Generator
) -> Bool[np.ndarray, " n"]:
    """Square units at random (Xie et al. 2021, section 3.2): (N,) True where a patch is hidden.

    ``unit``: patches of a unit's side; it divides the grid. Of the units the share ``ratio``,
    rounded up, is hidden: as many of every image.
    """
    rows, cols = grid[0] // unit, grid[1] // unit
    hidden = np.zeros(rows * cols, dtype=bool)
    hidden[rng.permutation(rows * cols)[: math.ceil(rows * cols * ratio)]] = True
    whole = hidden.reshape(rows, cols).repeat(unit, axis=0).repeat(unit, axis=1)
    return whole.reshape(-1)


def block_mask(
    grid: tuple[int, int], patches: int, rng: random.Random, exact: bool = False
) -> Bool[np.ndarray, "rows cols"]:
    """Blocks at random places until ``patches`` are hidden (Bao et al. 2022, algorithm 1).

    A block has 4 patches or more (fewer, where fewer are missing), height over width from 0.3 to
    1 / 0.3, and is smaller than the grid in each direction. Where none fits in ten attempts, a few
    patches are missing; ``exact``: they are filled up at random.
    """
    hidden = np.zeros(grid, dtype=bool)
    missing = patches
    while missing > 0 and (added := _add_block(hidden, missing, rng)):
        missing -= added
    if exact and missing > 0:
        free = np.flatnonzero(~hidden)
        hidden.flat[rng.sample(free.tolist(), missing)] = True
    return hidden


def _add_block(hidden: Bool[np.ndarray, "rows cols"], missing: int, rng: random.Random) -> int:
    """Hide one more block of at most ``missing`` new patches; how many those are."""
    rows, cols = hidden.shape
    most = min(missing, hidden.size / 2)
    for _ in range(10):
        area = rng.uniform(_LEAST, most)
        ratio = math.exp(rng.uniform(math.log(_ASPECT), -math.log(_ASPECT)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height >= rows or width >= cols:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, cols - width)
        block = hidden[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= most:
            block[...] = True
            return new
    return 0


@dataclass(frozen=True)
class BatchMasks:
    """Block masks of a batch's crops, whose shares of hidden patches are stratified (Oquab et al.
    2023, section 4 and code).

    Of all crops of a step the share ``probability`` is masked. The range ``ratio`` is cut into as
    many strata, of each of which one crop hides a share. In DINOv2 both are so in the batch of each
    process; here they are over all processes and parts, and in every group of 8 images that many
    crops are masked, with strata from the whole range: then each part hides about as much, and the
    masks do not depend on how a batch is split.

    Attributes:
        grid: rows and columns of a crop's patches.
        crops: masked crops of an image, all masked or not apart.
        probability, ratio: see above.
        exact: as in DINOv3, a crop hides the share at the upper end of its stratum, exactly; else
            one drawn from the stratum, of which blocks may lack a few patches.
    """

    grid: tuple[int, int]
    crops: int = 2
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    exact: bool = False

    def draw(self, places: Places) -> dict[str, np.ndarray]:
        """Masks of the crops of some images, and which of all their patches are hidden.

        ``masked``: (crops * count, N) True where a patch is hidden, all first crops, then all
        second ones. ``patches``: (U,) places of hidden patches in that, row after row; ``weights``:
        (U,) of each, 1 over the hidden patches of its crop, and 0 for padding, whose place is 0. U
        is the most that these images may hide, a function of the sizes of batch and part.
        """
        rows, cols = self.grid
        size, first = self._sizes(places.batch)[0], places.start
        masked = np.zeros((self.crops, places.count, rows * cols), dtype=bool)
        strata, known = np.zeros(0), -1
        for image in range(first, first + places.count):
            if image // size != known:
                known = image // size
                strata = self._strata(places.key, places.batch, known)
            for crop, stratum in enumerate(strata[:, image % size].tolist()):
                rng = random.Random(fold(places.key, image, crop))
                masked[crop, image - first] = self._mask(places.batch, stratum, rng)
        flat = masked.reshape(-1, rows * cols)
        found, most = np.flatnonzero(flat), self.most(places)
        patches, weights = np.zeros(most, dtype=np.int64), np.zeros(most, dtype=np.float32)
        patches[: len(found)] = found
        weights[: len(found)] = (1 / flat.sum(1).clip(min=1)).repeat(flat.sum(1))
        return {"masked": flat, "patches": patches, "weights": weights}

    def most(self, places: Places) -> int:
        """The most patches that these images may hide, all crops together."""
        size, groups, total = self._sizes(places.batch)
        tops = [min((block + 1) * groups, total) - 1 for block in range(-(-total // groups))]
        most = [self._patches(top, total, 1.0) for top in reversed(tops)]
        first, end = places.start, places.start + places.count
        found = 0
        for group in range(first // size, -(-end // size)):
            images = min(end, (group + 1) * size) - max(first, group * size)
            found += sum(most[: images * self.crops])
        return found

    def _sizes(self, batch: int) -> tuple[int, int, int]:
        """Images of a group, groups, and masked crops of a batch."""
        size = math.gcd(batch, _GROUP)
        return size, batch // size, int(batch * self.crops * self.probability)

    def _patches(self, stratum: int, total: int, share: float) -> int:
        """Hidden patches at this share of the way through a stratum, of so many."""
        low, high = self.ratio
        ratio = low + (high - low) * (stratum + share) / total
        return int(self.grid[0] * self.grid[1] * ratio + 1e-6)  # 0.25 * 196 is 49

    def _mask(self, batch: int, stratum: int, rng: random.Random) -> Bool[np.ndarray, " n"]:
        """A mask of a stratum; of none, if that is negative."""
        if stratum < 0:
            return np.zeros(self.grid[0] * self.grid[1], dtype=bool)
        share = 1.0 if self.exact else rng.random()
        patches = self._patches(stratum, self._sizes(batch)[2], share)
        return block_mask(self.grid, patches, rng, self.exact).reshape(-1)

    def _strata(self, key: int, batch: int, group: int) -> Int64[np.ndarray, "crops size"]:
        """The stratum of each crop of a group's images, -1 where it is not masked.

        Strata are dealt in blocks of as many as there are groups, one to each.
        """
        size, groups, total = self._sizes(batch)
        own = []
        for block in range(-(-total // groups)):
            turn = permute(np.array([group]), groups, fold(key, block, -1))[0]
            own += [stratum] if (stratum := block * groups + int(turn)) < total else []
        strata = np.full(self.crops * size, -1, dtype=np.int64)
        strata[random.Random(fold(key, group)).sample(range(len(strata)), len(own))] = own
        return strata.reshape(self.crops, size)
