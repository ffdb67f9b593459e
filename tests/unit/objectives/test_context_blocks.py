"""Context and target blocks: rectangles of a step's sizes, apart from each other, anywhere."""

import math
from itertools import pairwise

import numpy as np
import pytest

from ssl_vit.common.seeds import fold, generator
from ssl_vit.data.order import Places
from ssl_vit.objectives import context_blocks
from ssl_vit.objectives.context_blocks import _LEVELS, ContextBlocks

BATCH = 8
PAPER = ContextBlocks((16, 16))
KINDS = {
    "the paper's": PAPER,
    "not square": ContextBlocks((8, 14), targets=3),
    "small": ContextBlocks((6, 6), 2, (0.1, 0.2), (0.5, 2.0), (0.6, 0.8)),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def draw(blocks: ContextBlocks, step: int, start: int = 0, count: int = BATCH):
    return blocks.draw(Places(fold(7, step), BATCH, start, count))


def as_grids(blocks: ContextBlocks, patches: np.ndarray) -> np.ndarray:
    """(..., patches) as (..., rows, cols) True where a patch is listed."""
    inside = np.zeros((*patches.shape[:-1], math.prod(blocks.grid)), dtype=bool)
    np.put_along_axis(inside, patches, True, -1)
    return inside.reshape(*patches.shape[:-1], *blocks.grid)


def target_blocks(blocks: ContextBlocks, drawn: dict[str, np.ndarray]) -> np.ndarray:
    return as_grids(blocks, drawn["targets"][:, :, drawn["inside"]])


@ALL
def test_shapes_are_the_same_at_every_step(kind):
    blocks = KINDS[kind]
    for step in range(50):
        drawn = draw(blocks, step)
        assert drawn["context"].shape == (BATCH, blocks.kept)
        assert drawn["targets"].shape == (BATCH, blocks.targets, blocks.most)
        assert drawn["inside"].shape == (blocks.most,)
        assert [drawn[k].dtype.name for k in ("context", "targets", "inside")] == [
            "int64",
            "int64",
            "bool",
        ]


@ALL
def test_parts_of_a_batch_are_the_batch(kind):
    """And a function of the step: nothing else is drawn from."""
    for step in range(5):
        np.random.seed(step)
        whole, parts = (
            draw(KINDS[kind], step),
            [draw(KINDS[kind], step, s, 2) for s in (0, 2, 4, 6)],
        )
        for name in ("context", "targets"):
            assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])
        assert all(np.array_equal(part["inside"], whole["inside"]) for part in parts)
        assert not np.array_equal(draw(KINDS[kind], step + 99)["context"], whole["context"])


@ALL
def test_target_blocks_are_rectangles_of_one_size_in_a_step(kind):
    """Of a size that there is; over the steps every size is met, and the padding is patch 0."""
    blocks, met = KINDS[kind], set()
    for step in range(200):
        drawn = draw(blocks, step, count=2)
        grids = target_blocks(blocks, drawn)
        heights, widths = grids.any(-1).sum(-1), grids.any(-2).sum(-1)
        assert (grids.sum((-2, -1)) == heights * widths).all()
        assert len({*zip(heights.flat, widths.flat, strict=True)}) == 1
        met.add((int(heights[0, 0]), int(widths[0, 0])))
        for extent in (grids.any(-1), grids.any(-2)):  # without gaps
            assert (
                np.abs(np.diff(np.pad(extent.astype(int), ((0, 0), (0, 0), (1, 1))))).sum(-1) == 2
            ).all()
        assert (drawn["targets"][:, :, ~drawn["inside"]] == 0).all()
    assert met == {blocks.target_size(level) for level in range(_LEVELS)}
    assert max(rows * cols for rows, cols in met) == blocks.most


@ALL
def test_the_context_is_apart_from_all_targets(kind):
    """In order, each patch once, within a block of a size that there is."""
    blocks = KINDS[kind]
    largest = max(blocks.context_size(level) for level in range(_LEVELS))
    for step in range(50):
        drawn = draw(blocks, step)
        assert (np.diff(drawn["context"], axis=1) > 0).all()
        seen = as_grids(blocks, drawn["context"])
        assert not (seen & target_blocks(blocks, drawn).any(1)).any()
        for extent, side in zip((seen.any(-1), seen.any(-2)), largest, strict=True):
            places = np.arange(extent.shape[1])
            ends = np.where(extent, places, -1).max(1) - np.where(extent, places, 99).min(1)
            assert (ends < side).all()


def test_one_number_sets_area_and_aspect():
    """To whole patches: by the definition, in its ends and the middle."""
    n = 16 * 16
    for level, scale, aspect in ((0, 0.15, 0.75), (63, 0.2, 1.5)):
        expected = round(math.sqrt(n * scale * aspect)), round(math.sqrt(n * scale / aspect))
        assert PAPER.target_size(level) == expected
    sizes = [PAPER.target_size(level) for level in range(_LEVELS)]
    assert all(a[0] <= b[0] for a, b in pairwise(sizes))
    assert np.mean([rows * cols / n for rows, cols in sizes]) == pytest.approx(0.175, abs=0.005)
    assert {PAPER.context_size(level) for level in range(_LEVELS)} == {(15, 15), (16, 16)}


def test_sizes_of_steps_are_even_over_the_range():
    """Each of the 64 levels is as likely: the mean area of many steps is that of all levels."""
    areas = [draw(PAPER, step, count=1)["inside"].sum() for step in range(2000)]
    sizes = [math.prod(PAPER.target_size(level)) for level in range(_LEVELS)]
    deviation = np.std(sizes) / math.sqrt(len(areas))
    assert abs(np.mean(areas) - np.mean(sizes)) < 4 * deviation


def test_every_place_is_as_likely():
    """Rows and columns in which a block of 2 x 3 begins, in a grid of 5 x 6: 4 x 4 places; the few
    images that are drawn again (none here) would change that."""
    blocks = ContextBlocks((5, 6), 1, (0.2, 0.2), (0.7, 0.7), (1.0, 1.0))
    assert blocks.target_size(0) == (2, 3)
    grids = np.concatenate([target_blocks(blocks, draw(blocks, step))[:, 0] for step in range(400)])
    first = grids.reshape(len(grids), -1).argmax(1)
    counts = np.bincount(first, minlength=30).reshape(5, 6)
    assert counts[4:].sum() == counts[:, 4:].sum() == 0
    expected = len(grids) / 16
    chi_square = ((counts[:4, :4] - expected) ** 2 / expected).sum()
    assert abs(chi_square - 15) < 4 * math.sqrt(2 * 15)


@ALL
def test_of_fifty_images_one_has_fewer_context_patches_than_are_kept(kind):
    """Before it is drawn again; found of other draws than those that set the number."""
    blocks, rng = KINDS[kind], generator(5)
    left = np.concatenate([blocks._left(level, rng, 100) for level in range(_LEVELS)])
    assert (left < blocks.kept).mean() <= 0.035
    assert (left <= blocks.kept).mean() >= 0.01


def test_where_no_draw_leaves_enough_target_blocks_are_in_one_place(monkeypatch):
    monkeypatch.setattr(context_blocks, "_ATTEMPTS", 1)
    monkeypatch.setattr(ContextBlocks, "kept", property(lambda self: 160))
    drawn = [draw(PAPER, step) for step in range(5)]
    same = [
        (target_blocks(PAPER, d) == target_blocks(PAPER, d)[:, :1]).all((1, 2, 3)) for d in drawn
    ]
    assert np.concatenate(same).mean() > 0.9
    for one in drawn:
        assert not (as_grids(PAPER, one["context"]) & target_blocks(PAPER, one).any(1)).any()


def test_blocks_that_leave_no_context_keep_nothing():
    assert ContextBlocks((3, 3), 4, (0.9, 1.0)).kept <= 0
