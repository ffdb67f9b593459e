"""Order of shards: every image once an epoch, within windows of shards, whoever asks for it."""

import numpy as np
import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.data.base import Source, Subset, split_holdout
from ssl_vit.data.shard_order import check_order, order_of
from ssl_vit.data.slices import Planes

COUNTS = [7, 1, 0, 12, 5, 5, 9, 3]


class Shards(Source):
    """Images in shards of these counts; those of the network are apart."""

    spec = "tar:x"

    def __init__(self, counts: list[int], apart: str = "") -> None:
        self.starts, self.apart = np.cumsum([0, *counts]), apart

    def __len__(self) -> int:
        return int(self.starts[-1])


def shard_of(source: Source, images: np.ndarray) -> np.ndarray:
    return np.searchsorted(source.starts, images, side="right") - 1


@pytest.mark.parametrize("window", [1, 3, 8, 20])
@pytest.mark.parametrize("held", [0, 4])
def test_an_epoch_is_every_image_once_within_windows(window, held):
    source = split_holdout(Shards(COUNTS), held, 0)[0] if held else Shards(COUNTS)
    n = len(source)
    order = order_of(source, window, 6, seed=3)
    epochs = [order.at(epoch, np.arange(n)) for epoch in range(3)]
    orders = []
    for images in epochs:
        assert sorted(images.tolist()) == list(range(n))
        # Shards in the order in which they are first met: a window ends before the next begins.
        shards = shard_of(source, images)
        met = list(dict.fromkeys(shards.tolist()))
        orders.append(met)
        last = {s: int(np.flatnonzero(shards == s)[-1]) for s in met}
        first = {s: int(np.flatnonzero(shards == s)[0]) for s in met}
        open_at_once = max(sum(first[s] <= t <= last[s] for s in met) for t in range(n))
        assert open_at_once <= window
    assert not np.array_equal(epochs[0], epochs[1])
    assert len({tuple(sorted(met[:window])) for met in orders}) > 1 or window > 3
    if window == 20:
        assert not np.array_equal(epochs[0], np.sort(epochs[0]))


def test_parts_of_all_processes_are_the_global_batch():
    source = Shards(COUNTS)
    whole = order_of(source, 2, 12, 5)
    for step in range(7):
        parts = [
            order_of(source, 2, 12, 5, 2, rank, 3).part(step, part)
            for part in range(2)
            for rank in range(3)
        ]
        epoch, images = whole.part(step, 0)
        assert {e for e, _ in parts} == {epoch}
        assert np.concatenate([own for _, own in parts]).tolist() == images.tolist()


def test_what_is_read_soon_is_announced_a_window_ahead():
    """A step's shards are announced before it, also over the end of an epoch; and no more."""
    source = Shards([10] * 8)
    order = order_of(source, 2, 4, 1)
    soon = [set(shard_of(source, order.soon(step)).tolist()) for step in range(60)]
    used = [set(shard_of(source, order.part(step, 0)[1]).tolist()) for step in range(60)]
    assert all(now <= own for now, own in zip(used, soon, strict=True))
    assert all(later <= own for later, own in zip(used[1:], soon, strict=False))
    assert max(map(len, soon)) <= 2 * 3  # 20 images of a window: no step is in two of them


def test_of_all_images_nothing_is_announced():
    order = order_of(Shards(COUNTS), 0, 4, 1)
    assert len(order.soon(0)) == 0
    assert order.about() == []
    assert "8 shards at random, images shuffled within 3 of them" in str(
        order_of(Shards(COUNTS), 3, 4, 1).about()
    )


def test_shards_of_subsets_and_of_planes():
    source = Shards(COUNTS)
    some = Subset(source, np.array([0, 6, 7, 8, 20, 41]))
    assert shard_of(some, np.arange(6)).tolist() == [0, 0, 1, 3, 4, 7]
    assert Subset(source, np.array([3, 1])).starts is None
    counts = np.arange(len(source)) % 3 + 1
    planes = Planes(source, counts, 3)
    assert (
        shard_of(planes, np.arange(len(planes))).tolist()
        == np.repeat(shard_of(source, np.arange(len(source))), counts).tolist()
    )


def test_what_cannot_be_is_refused():
    plain = Shards(COUNTS)
    plain.starts = None
    with pytest.raises(UserError, match="shard-window is 4, but tar:x has no shards; leave it out"):
        check_order(plain, 4)
    far = Shards(COUNTS, "its shards take 3 GB, and there is no room")
    with pytest.raises(UserError, match=r"but its shards take 3 GB, .* --data.shard-window 8"):
        check_order(split_holdout(far, 4, 0)[0], 0)
    check_order(far, 4)
    check_order(plain, 0)
