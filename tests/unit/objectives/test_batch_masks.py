"""Block masks of a batch: strata, chance, and that it does not matter how the batch is split."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ssl_vit.data.order import Places
from ssl_vit.objectives.masks import BatchMasks

MASKS = BatchMasks((8, 6))


def draw(masks: BatchMasks, batch: int, key: int = 0) -> dict[str, np.ndarray]:
    return masks.draw(Places(key, batch, 0, batch))


def by_image(drawn: dict[str, np.ndarray], crops: int = 2) -> np.ndarray:
    """(images, crops, N)."""
    return drawn["masked"].reshape(crops, -1, drawn["masked"].shape[1]).swapaxes(0, 1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("probability", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("batch", [64, 24, 12, 7, 1])
def test_a_batch_in_parts_is_the_batch(batch, probability, exact):
    """Aligned with groups or not; what is padded has the room that it needs."""
    masks = replace(MASKS, probability=probability, exact=exact)
    whole = by_image(draw(masks, batch, key=3))
    for parts in (n for n in (1, 2, 3, 4, 8) if batch % n == 0):
        size = batch // parts
        for part in range(parts):
            places = Places(3, batch, part * size, size)
            found = masks.draw(places)
            assert np.array_equal(by_image(found), whole[part * size : (part + 1) * size])
            n = found["masked"].sum()
            assert n <= len(found["patches"]) == len(found["weights"]) == masks.most(places)
            hidden = found["masked"].reshape(-1)
            assert np.array_equal(found["patches"][:n], np.flatnonzero(hidden))
            assert not found["patches"][n:].any()
            assert not found["weights"][n:].any()
            expected = 1 / found["masked"].sum(1).clip(min=1)
            rows = found["patches"][:n] // 48
            np.testing.assert_allclose(found["weights"][:n], expected[rows], rtol=1e-6)


def test_groups_of_eight_hide_about_as_much():
    """And exactly as many crops of each are masked: a part has little room to spare."""
    masks = replace(MASKS, exact=True)
    hidden = by_image(draw(masks, 128)).sum(2)
    assert ((hidden.reshape(16, 16) > 0).sum(1) == 8).all()
    totals = hidden.reshape(16, 16).sum(1)
    assert totals.max() <= masks.most(Places(0, 128, 0, 8)) <= 1.15 * 8 * 0.3 * 48
    assert totals.min() > 0.85 * 8 * 0.3 * 48


def test_no_group_has_the_lower_strata_always():
    """Of eight groups the first hides less than the mean in about half of the draws."""
    masks = replace(MASKS, grid=(20, 20), exact=True)
    totals = [by_image(draw(masks, 64, k)).sum((1, 2)).reshape(8, 8).sum(1) for k in range(60)]
    assert 15 < sum(own[0] < own.mean() for own in totals) < 45


def test_each_stratum_is_there_once():
    """Of the whole batch, not of a group: 128 ends of strata, in steps of less than a patch."""
    masks = replace(MASKS, grid=(40, 30), exact=True)
    hidden = np.sort(by_image(draw(masks, 128)).sum(2).reshape(-1))
    assert (hidden[:128] == 0).all()
    ends = [int(1200 * (0.1 + 0.4 * i / 128) + 1e-6) for i in range(1, 129)]
    assert hidden[128:].tolist() == ends


def test_within_a_stratum_any_share_is_as_likely():
    """One image a batch, one stratum: uniform from 0.1 to 0.5, but for a few missing patches."""
    masks = replace(MASKS, grid=(20, 20))
    shares = np.sort([draw(masks, 1, key)["masked"].sum() / 400 for key in range(400)])
    expected = 0.1 + 0.4 * (np.arange(400) + 0.5) / 400
    # Kolmogorov's distance: 1.63 / sqrt(n) is passed by one in a hundred.
    assert np.abs(shares - expected).max() / 0.4 < 1.63 / math.sqrt(400)


def test_every_crop_is_masked_as_often():
    """Chi-square of how often each of the 16 crops is; of 16 half are in every draw."""
    counts = sum((by_image(draw(MASKS, 8, key)).sum(2) > 0).astype(float) for key in range(400))
    chi_square = ((counts - 200) ** 2 / 200).sum() * 15 / 8
    assert abs(chi_square - 15) < 4 * math.sqrt(30)


def test_masks_are_a_function_of_key_and_place():
    first, again, other = draw(MASKS, 16, 1), draw(MASKS, 16, 1), draw(MASKS, 16, 2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["masked"], other["masked"])
    assert len({row.tobytes() for row in first["masked"] if row.any()}) > 10
