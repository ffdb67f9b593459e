"""Quarter turns: exact pixels, crops that are not square, and that all else is drawn as without."""

import dataclasses
import random
from collections import Counter

import pytest
import torch

from ssl_vit.data.augment import Crop, ViewSpec, cut_out, draw_cut, draw_views, resized, take_views
from ssl_vit.data.photometric import Photometric
from ssl_vit.data.reduced import GAP, reduction

replace = dataclasses.replace


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def test_a_turned_image_has_its_own_pixels():
    """Of a crop that is the whole image none is interpolated; each turn is as likely."""
    image, n = picture(12, 12), 600
    crop = Crop((12, 12), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, quarter_turns=1.0)
    turned = [image.rot90(k, (1, 2)) for k in range(4)]
    found = Counter[int]()
    for seed in range(n):
        ((made,),) = take_views(image, ViewSpec((crop,)), random.Random(seed))
        turns = next(k for k in range(4) if torch.equal(made.crop, turned[k]))
        assert made.place[4] == 4 * turns
        found[turns] += 1
    assert set(found) == {1, 2, 3}
    assert all(abs(count / n - 1 / 3) < 0.08 for count in found.values())


def test_a_crop_that_is_not_square_is_turned_without_stretching():
    """An image of the crop's shape on its side fills it, pixel by pixel."""
    image = picture(12, 18)
    crop = Crop((18, 12), (1.0, 1.0), (1.5, 1.5), flip=0.0, quarter_turns=1.0)
    found = set()
    for seed in range(40):
        cut = draw_cut(12, 18, crop, random.Random(seed), policies=False)
        made = cut_out(image, crop, cut)
        assert made.shape == (3, 18, 12)
        if cut.turns % 2:
            assert cut.size(crop) == (12, 18)
            assert torch.equal(made, image.rot90(cut.turns, (1, 2)))
        found.add(cut.turns)
    assert found == {1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_is_its_box_resized_flipped_and_turned(dtype):
    """As its place says, with missing pixels where they were."""
    image = picture(40, 61).to(dtype)
    if dtype == torch.float32:
        image[:, 5:20, 30:] = torch.nan
    crop = Crop((12, 9), (0.1, 0.9), count=3, vertical_flip=0.5, quarter_turns=0.75)
    ways = set()
    for seed in range(40):
        for made in take_views(image, ViewSpec((crop,)), random.Random(seed))[0]:
            sides = [v * s for v, s in zip(made.place, [40, 61, 40, 61], strict=False)]
            top, left, height, width = map(round, sides)
            way = int(made.place[4])
            turns, size = way // 4, (9, 12) if way // 4 % 2 else (12, 9)
            expected = resized(image[:, top : top + height, left : left + width], size)
            expected = expected.flip(-1) if way & 1 else expected
            expected = expected.flip(-2) if way & 2 else expected
            expected = expected.rot90(turns, (-2, -1))
            assert torch.equal(made.crop.nan_to_num(-1), expected.nan_to_num(-1))
            ways.add(way)
    assert ways == set(range(16))


def test_all_else_is_drawn_as_without_turns():
    plain = Crop((8, 12), photometric=Photometric(jitter=0.5), vertical_flip=0.5)
    shares = []
    for seed in range(400):
        rngs = [random.Random(seed) for _ in range(3)]
        crops = [replace(plain, quarter_turns=p) for p in (0.0, 0.3, 1.0)]
        none, some, always = (
            draw_cut(30, 40, crop, rng, policies=False)
            for crop, rng in zip(crops, rngs, strict=True)
        )
        for cut in (some, always):
            way = none.place[4] + 4 * cut.turns
            assert cut == none._replace(turns=cut.turns, place=(*none.place[:4], way))
        assert (none.turns, always.turns > 0) == (0, True)
        shares.append(some.turns > 0)
    assert sum(shares) / 400 == pytest.approx(0.3, abs=0.08)


def test_with_both_flips_every_orientation_is_as_likely():
    """Half, half and three quarters: what presets for images without an up have."""
    mark, n = torch.arange(4, dtype=torch.uint8).view(1, 2, 2), 4000
    crop = Crop((2, 2), (1.0, 1.0), (1.0, 1.0), vertical_flip=0.5, quarter_turns=0.75)
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(n):
        ((made,),) = take_views(mark, ViewSpec((crop,)), random.Random(seed))
        found[tuple(made.crop.flatten().tolist())] += 1
    assert len(found) == 8
    # Chi-square with 7 degrees of freedom, one in a thousand by chance.
    assert sum((c - n / 8) ** 2 / (n / 8) for c in found.values()) < 24.3


def test_the_reduction_of_a_jpeg_is_by_the_side_that_is_filled():
    crop = Crop((50, 40), quarter_turns=1.0)
    spec = ViewSpec((crop,))
    cut = draw_views(999, 999, spec, random.Random(0), policies=False)[0][0]
    upright, turned = cut._replace(turns=2), cut._replace(turns=1)
    tall, wide = (0, 0, 50 * GAP * 4, 40 * GAP * 4), (0, 0, 40 * GAP * 4, 50 * GAP * 4)
    assert reduction(spec, [[upright._replace(box=tall)]]) == 4
    assert reduction(spec, [[upright._replace(box=wide)]]) == 2
    assert reduction(spec, [[turned._replace(box=wide)]]) == 4
    assert reduction(spec, [[turned._replace(box=tall)]]) == 2
