"""Crops against torchvision's, the evaluation crop, and normalisation."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as tvf

from ssl_vit.common.task import Views
from ssl_vit.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Crop,
    ViewSpec,
    center_view,
    crop_box,
    draw_views,
    take_views,
)
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.photometric import Photometric, photometric

BICUBIC = v2.InterpolationMode.BICUBIC
SHAPES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (3, 3),
    (1, 500),
    (500, 1),
    (7, 300),
    (300, 7),
    (32, 32),
    (40, 61),
]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)


def boxes(height: int, width: int, crop: Crop, n: int) -> np.ndarray:
    return np.array([crop_box(height, width, crop, random.Random(i)) for i in range(n)])


# --- crop_box -----------------------------------------------------------------------------------


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize("shape", [(224, 224), (120, 333), (500, 375), (60, 400)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_torchvisions(shape, scale):
    """Area share, log ratio and place; on 60x400 the fallback after ten misses is among them."""
    n, crop = 4000, Crop((32, 32), scale=scale)
    ours = boxes(*shape, crop, n)
    image = torch.empty(1, *shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(image, [*scale], [3 / 4, 4 / 3]) for _ in range(n)]

    def marginals(found: np.ndarray) -> list[np.ndarray]:
        top, left, h, w = np.asarray(found, dtype=float).T
        area, ratio = h * w / shape[0] / shape[1], np.log(w / h)
        # The place among all that were possible; 1/2 where only one was.
        down = (top + 0.5) / (shape[0] - h + 1)
        right = (left + 0.5) / (shape[1] - w + 1)
        return [area, ratio, down, right, h, w]

    for a, b in zip(marginals(ours), marginals(theirs), strict=True):
        assert distance(a, b) < 1.95 * math.sqrt(2 / n)  # one in a thousand by chance


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_lie_inside_the_image(shape):
    """Of any image, however small or long, and never empty."""
    for scale in ((0.2, 1.0), (0.001, 0.01), (1.0, 1.0)):
        top, left, h, w = boxes(*shape, Crop((8, 8), scale=scale), 200).T
        assert (h >= 1).all()
        assert (w >= 1).all()
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + h <= shape[0]).all()
        assert (left + w <= shape[1]).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((9, 9), (0, 0, 9, 9))],
)
def test_the_fallback_is_the_largest_central_box(shape, expected):
    """Where no drawn box fits (here: more than the whole area), the one of the nearest ratio."""
    assert crop_box(*shape, Crop((8, 8), scale=(9.0, 9.0)), random.Random(0)) == expected


# --- random crops -------------------------------------------------------------------------------


def random_crop(image: torch.Tensor, crop: Crop, rng: random.Random) -> torch.Tensor:
    """One random crop, photometric operations left out."""
    alone = dataclasses.replace(crop, count=1, photometric=None)
    return take_views(image, ViewSpec((alone,)), rng)[0][0][0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_a_crop_is_torchvisions_on_the_same_box(dtype, size):
    image = picture(40, 57)
    image = image if dtype == torch.uint8 else image.float() / 255
    for seed in range(20):
        crop = Crop(size, flip=0.0)
        ours = random_crop(image, crop, random.Random(seed))
        box = crop_box(40, 57, crop, random.Random(seed))
        theirs = tvf.resized_crop(image, *box, list(size), interpolation=BICUBIC, antialias=True)
        assert ours.dtype == dtype
        assert ours.shape == (3, *size)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_flip_is_of_the_given_probability():
    """0 never, 1 always (the mirror image of the same box), between them that share."""
    image = picture(20, 31)
    plain = [random_crop(image, Crop((8, 8), flip=0.0), random.Random(i)) for i in range(400)]
    always = [random_crop(image, Crop((8, 8), flip=1.0), random.Random(i)) for i in range(400)]
    some = [random_crop(image, Crop((8, 8), flip=0.3), random.Random(i)) for i in range(400)]
    assert all(torch.equal(a.flip(-1), p) for a, p in zip(always, plain, strict=True))
    flipped = [torch.equal(s, a) for s, a in zip(some, always, strict=True)]
    kept = [torch.equal(s, p) for s, p in zip(some, plain, strict=True)]
    assert [not f for f in flipped] == kept
    assert np.mean(flipped) == pytest.approx(0.3, abs=0.08)


def test_vertical_flips_are_drawn_after_all_else():
    """And are in the crop's place, with the horizontal one; all other draws stay as they are."""
    image = (torch.arange(3 * 30 * 40) % 251).to(torch.uint8).view(3, 30, 40)
    replace, rng, crop = dataclasses.replace, random.Random, Crop((8, 8), flip=0.0)
    for flip in (0.0, 1.0):
        plain, turned = (
            take_views(image, ViewSpec((replace(crop, flip=flip, vertical_flip=p),)), rng(3))
            for p in (0.0, 1.0)
        )
        assert torch.equal(turned[0][0].crop, plain[0][0].crop.flip(-2))
        assert turned[0][0].place == (*plain[0][0].place[:4], flip + 2)
    spec = ViewSpec((replace(crop, vertical_flip=0.3),))
    some = [draw_views(30, 40, spec, rng(i), policies=False)[0][0] for i in range(400)]
    assert np.mean([cut.vertical_flip for cut in some]) == pytest.approx(0.3, abs=0.08)


def test_a_crop_of_the_images_own_size_is_the_image():
    image = picture(12, 12)
    crop = Crop((12, 12), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    assert torch.equal(random_crop(image, crop, random.Random(0)), image)


def test_views_are_the_crops_that_were_asked_for():
    """By kind and count, all of different boxes, the same again for the same generator."""
    spec = ViewSpec((Crop((16, 16), count=2), Crop((8, 12), scale=(0.05, 0.2), count=3)))
    views = take_views(picture(40, 40), spec, random.Random(1))
    assert [[tuple(c.crop.shape) for c in kind] for kind in views] == [
        [(3, 16, 16)] * 2,
        [(3, 8, 12)] * 3,
    ]
    assert not torch.equal(views[0][0][0], views[0][1][0])
    again = take_views(picture(40, 40), spec, random.Random(1))
    for kind, same in zip(views, again, strict=True):
        assert all(torch.equal(a.crop, b.crop) for a, b in zip(kind, same, strict=True))


def test_views_without_photometric_operations_draw_nothing_for_them():
    """The generator is used for crops alone, so runs without them keep their numbers."""
    image, crops = picture(40, 40), (Crop((16, 16), count=2), Crop((8, 8)))
    rng, again = random.Random(1), random.Random(1)
    views = take_views(image, ViewSpec(crops), rng)
    expected = [random_crop(image, c, again) for c in (crops[0], *crops)]
    for (crop, drawn, *_), same in zip([*views[0], *views[1]], expected, strict=True):
        assert torch.equal(crop, same)
        assert drawn == []
    assert rng.random() == again.random()


def test_photometric_parameters_are_drawn_after_their_crop():
    """Crop, parameters, next crop, its parameters: all from the sample's one generator."""
    image, photometric = picture(40, 40), Photometric(jitter=0.5, blur=0.5)
    crop = Crop((8, 8), count=2, photometric=photometric)
    again = random.Random(1)
    for taken, drawn, *_ in take_views(image, ViewSpec((crop,)), random.Random(1))[0]:
        assert torch.equal(taken, random_crop(image, crop, again))
        assert drawn == photometric.draw(again)


@pytest.mark.parametrize("shape", [(40, 61), (7, 300), (32, 32)])
@pytest.mark.parametrize("flip", [0.0, 1.0, 0.5])
def test_a_crop_is_its_box_of_the_image(shape, flip):
    """The box from its shares of the image's sides, resized, and mirrored where that is said."""
    image, flips = picture(*shape), []
    spec = ViewSpec((Crop((12, 9), (0.05, 0.9), flip=flip, count=8), Crop((6, 6), flip=flip)))
    for kind in take_views(image, spec, random.Random(3)):
        for crop, _, place, _ in kind:
            assert all(0 <= share <= 1 for share in place)
            edges = [share * side for share, side in zip(place, [*shape, *shape], strict=False)]
            top, left, height, width = map(round, edges)
            np.testing.assert_allclose(edges, [top, left, height, width], atol=1e-9)
            box = image[:, top : top + height, left : left + width]
            expected = tvf.resize(box, list(crop.shape[1:]), BICUBIC, antialias=True)
            assert place[4] in (0.0, 1.0)
            flips.append(place[4])
            assert torch.equal(crop, expected.flip(-1) if place[4] else expected)
    assert set(flips) == ({flip} if flip in (0, 1) else {0.0, 1.0})


# --- center_view --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(16, 16), (12, 30)])
@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
def test_the_evaluation_crop_has_its_size(shape, size, crop_ratio):
    for channels in (1, 3, 5):
        view = center_view(picture(*shape, channels), size, crop_ratio)
        assert view.shape == (channels, *size)
        assert view.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(300, 400), (480, 270), (256, 256), (100, 125)])
def test_the_evaluation_crop_is_the_custom_of_imagenet(shape):
    """Short side to 256, then the central 224: what torchvision's own transforms make.

    They truncate the long side where it is rounded here; these shapes make no difference.
    """
    image = picture(*shape)
    resize = v2.Resize(256, interpolation=BICUBIC, antialias=True)
    theirs = v2.CenterCrop(224)(resize(image))
    assert torch.equal(center_view(image, (224, 224), 0.875), theirs)


def test_the_evaluation_crop_keeps_the_aspect_ratio():
    """A gradient along each axis tells where the crop's corners came from."""
    rows, cols = torch.meshgrid(torch.arange(90.0), torch.arange(200.0), indexing="ij")
    view = center_view(torch.stack([rows, cols]), (60, 60), 1.0)
    # The scale is 60 / 90 both ways: all rows are seen, and 90 central columns of 200.
    assert view[0, 0, 30] == pytest.approx(0.25, abs=0.5)
    assert view[0, -1, 30] == pytest.approx(88.75, abs=0.5)
    assert view[1, 30, 0] == pytest.approx(55.25, abs=1.5)
    assert view[1, 30, -1] == pytest.approx(143.75, abs=1.5)


def test_an_image_that_fits_is_not_resampled():
    image = picture(32, 32)
    assert torch.equal(center_view(image, (32, 32), 1.0), image)


# --- Normalize ----------------------------------------------------------------------------------


def test_normalize_is_the_textbook_formula():
    """uint8 is scaled to 0..1 first, floats are not; the inverse gives the 0..1 image back."""
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    images = torch.stack([picture(5, 7, seed=i) for i in range(2)])
    out = normalize.images(images)
    assert out.dtype == torch.float32
    for channel in range(3):
        expected = (images[:, channel] / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(out[:, channel], expected)
    torch.testing.assert_close(normalize.images(images / 255), out)
    torch.testing.assert_close(normalize.inverse(out), images / 255)


def test_normalize_takes_a_whole_batch_of_views():
    """Every kind of crop is normalised; keys and labels pass through."""
    normalize = Normalize((0.5,), (0.25,))
    crops = [torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), torch.zeros(4, 1, 2, 2)]
    views = Views(crops, torch.tensor([5, 6]), torch.tensor([1, -1]))
    out = normalize(views)
    assert [c.unique().tolist() for c in out.crops] == [[2.0], [-2.0]]
    assert [tuple(c.shape) for c in out.crops] == [(2, 1, 4, 4), (4, 1, 2, 2)]
    assert out.keys.tolist() == [5, 6]
    assert out.labels.tolist() == [1, -1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_augments_what_has_parameters(dtype):
    """Before it standardises; the batch itself is left alone, and the result has none to apply."""
    bounded = dtype == torch.uint8
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, bounded)
    images = torch.stack([picture(9, 7, seed=i) for i in range(4)])
    images = images if dtype == torch.uint8 else images / 100 - 1
    spec = Photometric(jitter=1.0, gray=0.3, blur=0.5, solarize=0.5)
    drawn = torch.tensor([spec.draw(random.Random(i)) for i in range(4)])
    before = images.clone()
    keys = torch.arange(2)
    out = normalize(Views([images, images[:2]], keys, keys, [drawn, torch.empty(2, 0)]))
    assert torch.equal(images, before)
    assert out.photometric == []
    scaled = images / 255 if dtype == torch.uint8 else images.clone()
    changed = photometric(scaled, drawn, bounded)
    torch.testing.assert_close(normalize.inverse(out.crops[0]), changed, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.crops[1], normalize.images(images[:2]))
    assert (normalize.inverse(out.crops[0]) - normalize.inverse(normalize.images(images))).any()


def test_normalize_adds_nothing_to_a_state_dict():
    """Statistics travel as metadata; the weights have exactly the encoder's names."""
    assert not Normalize((0.5,), (0.25,)).state_dict()


def test_a_crop_is_augmented_alike_whatever_it_meets():
    """Beside a deeper image an 8-bit one comes as float; it is solarised as it would be alone."""
    crop = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    parameters = torch.tensor([[1.0, 1, 1, 0, -1, -2, 1, 0, 0, 1]])
    normalize = Normalize((0.0,), (1.0,))
    keys = torch.zeros(1, dtype=torch.int64)
    found = [
        normalize(Views([images], keys, keys, [parameters])).crops[0]
        for images in (crop, crop.float() / 255)
    ]
    torch.testing.assert_close(found[0], torch.full((1, 1, 4, 4), 55 / 255))
    torch.testing.assert_close(found[0], found[1])
