"""Order of shards: shards in random order, and images shuffled within a window of some of them.

For disks that read best in a row, and for shards of the network that are fetched as they are used.
Like the order of all images, it is a function of (seed, epoch, position).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.base import Source, epoch_length
from ssl_vit.data.order import Order, permute

# What the orders of shards are folded from, apart from those of images.
_SHARDS = 0x5A4D
_USUAL = 8  # shards of a window


@dataclass(frozen=True, eq=False)
class WindowOrder(Order):
    """Batch order by windows of shards.

    Attributes:
        starts: int64 (shards + 1,), as ``Source.starts`` of the training set.
        window: shards of a window.
    """

    starts: Int64[np.ndarray, " s"] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    window: int = 1

    def at(self, epoch: int, positions: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """The images at these positions of an epoch."""
        shards, ends = self._epoch(epoch)
        out = np.empty_like(positions)
        windows = self._windows(epoch, positions)
        for window in np.unique(windows):
            here = windows == window
            own = shards[window * self.window : (window + 1) * self.window]
            counts = self.starts[own + 1] - self.starts[own]
            before = ends[window] - counts.sum()
            n, key = int(counts.sum()), fold(self.seed, epoch, _SHARDS, int(window))
            within = permute(positions[here] - before, n, key)
            firsts = np.cumsum(counts) - counts
            shard = np.searchsorted(firsts + counts, within, side="right")
            out[here] = self.starts[own[shard]] + within - firsts[shard]
        return out

    def soon(self, step: int) -> Int64[np.ndarray, " k"]:
        """One image of each shard of the windows that a step is in, and of the next one."""
        epoch, within = divmod(step, self.steps_per_epoch)
        edges = np.array([within, within + 1], dtype=np.int64) * self.batch_size - [0, 1]
        first, last = self._windows(epoch, edges).tolist()
        shards = self._epoch(epoch)[0]
        own = shards[first * self.window : (last + 2) * self.window]
        used = int(self._windows(epoch, np.array([self.steps_per_epoch * self.batch_size - 1]))[0])
        if last >= used:  # the rest of the epoch is dropped
            own = np.append(own, self._epoch(epoch + 1)[0][: self.window])
        own = own[self.starts[own + 1] > self.starts[own]]  # of some all images may be held out
        return self.starts[own]

    def about(self) -> list[tuple[str, str]]:
        shards = f"{len(self.starts) - 1:,} shards at random"
        return [("order", f"{shards}, images shuffled within {self.window:,} of them at a time")]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of an epoch, and the positions after the last of each window."""
        shards = _shards_of(len(self.starts) - 1, self.seed, epoch)
        counts = self.starts[shards + 1] - self.starts[shards]
        ends = np.add.reduceat(counts, np.arange(0, len(counts), self.window)).cumsum()
        return shards, ends

    def _windows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The window of each position."""
        return np.searchsorted(self._epoch(epoch)[1], positions, side="right")


@lru_cache(maxsize=4)
def _shards_of(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of all shards in an epoch."""
    return permute(np.arange(count, dtype=np.int64), count, fold(seed, epoch, _SHARDS))


def order_of(
    source: Source,
    window: int,
    batch_size: int,
    seed: int,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Order:
    """Order of a training set that ``check_order`` has passed."""
    shared = (epoch_length(source), batch_size, seed, accumulate, rank, world)
    if not window:
        return Order(*shared)
    assert source.starts is not None
    return WindowOrder(*shared, starts=source.starts, window=window)


def check_order(source: Source, window: int) -> None:
    """Check that a source can be read by windows of so many shards; 0: from all images at once.

    Raises:
        UserError: it has no shards, or too many for the shard cache to be drawn from all at once.
    """
    if source.mix is not None:
        one = f"it is for one source of shards, and {source.spec} are several"
        check(not window, f"--data.shard-window is {window}; {one}")
        several = "images of several sources are drawn from all of them at once"
        check(not source.apart, f"{source.spec!r}: {several}, but {source.apart}")
        return
    check(
        not window or source.starts is not None,
        f"--data.shard-window is {window}, but {source.spec} has no shards; leave it out",
    )
    check(bool(window) or not source.apart, needs_window(source.spec, source.apart))


def needs_window(spec: str, apart: str, most: int = _USUAL) -> str:
    """Reason why a source cannot be trained on without a window, and what to do.

    ``apart``: as ``Source.apart``. ``most``: shards of a window that the cache has room for.
    """
    text = f"{spec!r}: images are drawn from all shards at once, but {apart}"
    window = min(most, _USUAL)
    if not window:
        return text
    return (
        f"{text}. Or give --data.shard-window {window}: shards in random order, images shuffled "
        f"within {window} of them at a time"
    )
