"""Sample order: a keyed permutation, evaluated separately for each position.

There is no shuffled list, so an epoch over a billion images costs nothing to start or to resume.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from ssl_vit.common.seeds import fold

_ROUNDS = 6
# Orders of at most this many images are cached.
_SMALL = 1 << 16


def permute(positions: Int64[np.ndarray, " k"], n: int, key: int) -> Int64[np.ndarray, " k"]:
    """Permute positions by a permutation of ``range(n)`` chosen by ``key``.

    A Feistel network over the next even power of two, walked until it lands inside ``range(n)``
    (cycle walking; Black and Rogaway 2002, section 3): at most 4 steps on average.
    """
    half = max(1, -(-max(1, (n - 1).bit_length()) // 2))
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(fold(key, r)) for r in range(_ROUNDS)]
    out = positions.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        x = out[outside]
        left, right = x >> np.uint64(half), x & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        out[outside] = (left << np.uint64(half)) | right
        outside = out >= n
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Places:
    """Places of some images, in a row, among all images of a step, over all processes and parts.

    Attributes:
        key: of the step; the same for all its images.
        batch: images of the step.
        start, count: these are the images from ``start`` on, ``count`` of them.
    """

    key: int
    batch: int
    start: int
    count: int


@dataclass(frozen=True)
class Order:
    """Batch order of a run, a function of (seed, step).

    Attributes:
        n: images in the training set.
        batch_size: images of one step over all processes; an epoch's incomplete last batch is
            dropped (other images each epoch).
        seed: the run's.
        accumulate: parts of a step on each process.
        rank, world: this process among all.
    """

    n: int
    batch_size: int
    seed: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Complete batches in an epoch."""
        return self.n // self.batch_size

    def part(self, step: int, part: int) -> tuple[int, Int64[np.ndarray, " k"]]:
        """Indices of this process' ``part``-th part of a step: (epoch, image indices).

        The parts of all processes together are the step's global batch, independent of the number
        of processes and parts.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        own = self.places(step, part)
        start = within * self.batch_size + own.start
        return epoch, self.at(epoch, np.arange(start, start + own.count, dtype=np.int64))

    def at(self, epoch: int, positions: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """The images at these positions of an epoch."""
        if self.n <= _SMALL:
            return _whole_epoch(self.n, self.seed, epoch)[positions]
        return permute(positions, self.n, fold(self.seed, epoch))

    def soon(self, step: int) -> Int64[np.ndarray, " k"]:
        """Images that stand for the shards that are read from this step on; of no order of shards
        there are none."""
        return np.zeros(0, dtype=np.int64)

    def about(self) -> list[tuple[str, str]]:
        """Plan rows on it: none for that of all images."""
        return []

    def places(self, step: int, part: int) -> Places:
        """Places of the images of :meth:`part` in the step's global batch."""
        size = self.batch_size // (self.world * self.accumulate)
        start = (part * self.world + self.rank) * size
        return Places(fold(self.seed, step), self.batch_size, start, size)


@lru_cache(maxsize=2)
def _whole_epoch(n: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    """Order of a whole epoch, for few images: it costs as much as that of one batch."""
    return permute(np.arange(n, dtype=np.int64), n, fold(seed, epoch))
