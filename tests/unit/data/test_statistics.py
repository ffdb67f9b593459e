"""Statistics of images: estimates, what is missing, depth, channels, and values that do not fit."""

from typing import Any

import numpy as np
import pytest
import torch

from ssl_vit.common.errors import UserError
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ssl_vit.data.base import Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.statistics import FEW, MANY, Survey, estimate_statistics, survey, survey_of

NAN = float("nan")


class Arrays(Source):
    """These arrays (H, W, C); None: unreadable. ``reads`` counts."""

    spec, classes, labels = "arrays", None, None

    def __init__(self, arrays: list[np.ndarray | None]) -> None:
        self.arrays, self.reads = arrays, 0

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, i: int) -> tuple[Any, int | None]:
        self.reads += 1
        found = self.arrays[i]
        if found is None:
            raise BadImage("is garbage")
        return found, None

    def name(self, i: int) -> str:
        return f"image-{i}"


def noise(n: int, shape: tuple[int, ...] = (), dtype: Any = np.uint8, top: int = 256) -> list:
    rng = np.random.default_rng(0)
    sides = lambda: shape or (*rng.integers(6, 20, 2), 3)  # noqa: E731
    return [rng.integers(0, top, sides()).astype(dtype) for _ in range(n)]


def estimate(arrays: list, channels: int = 3, seed: int = 0) -> tuple:
    return estimate_statistics(survey(Arrays(arrays), channels, seed, MANY))


# --- estimates ----------------------------------------------------------------------------------


def test_estimates_are_those_of_all_pixels():
    """With images of one size, mean and (biased) deviation over all pixels of each channel."""
    arrays = noise(40, (6, 9, 3))
    pixels = np.stack(arrays[:7] + arrays[8:]) / 255
    arrays[7] = None
    mean, std, warnings = estimate(arrays)
    assert mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-6)
    assert std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-6)
    assert warnings == []


def test_images_weigh_equally_and_are_sampled_by_the_seed():
    """A big image counts as much as a small one."""
    arrays = noise(MANY + 1, (2, 2, 3)) + noise(3)
    means = np.stack([a.mean((0, 1)) for a in arrays[-3:]]) / 255
    assert estimate(arrays[-3:])[0] == pytest.approx(means.mean(0), abs=1e-6)
    assert estimate(arrays, seed=1) == estimate(arrays, seed=1)
    assert estimate(arrays, seed=1) != estimate(arrays, seed=2)
    assert len(survey(Arrays(arrays), 3, 1, MANY)) == MANY


@pytest.mark.parametrize(
    ("dtype", "low", "spread", "to"),
    [
        (np.uint32, 4.0e9, 1.0e3, 1e-6),
        (np.int32, -2.0e9, 1.0e5, 1e-6),
        (np.float64, 1.0e9, 1.0e3, 1e-6),
        (np.float32, 3.0e-7, 1.0e-8, 0.01),
        (np.float32, 300.0, 1.0e-3, 0.001),
    ],
)
def test_estimates_of_huge_and_tiny_values(dtype, low, spread, to):
    """No difference of large squares, and as many decimals as there are digits."""
    rng = np.random.default_rng(0)
    arrays = [(low + spread * rng.standard_normal((30, 30, 2))).astype(dtype) for _ in range(9)]
    seen = np.stack([a.astype(np.float32).astype(np.float64) for a in arrays])
    mean, std, _ = estimate(arrays, channels=2)
    assert np.abs(np.array(mean) - seen.mean((0, 1, 2))).max() < 0.01 * spread
    assert std == pytest.approx(seen.std((0, 1, 2)), rel=to)


def test_missing_pixels_are_left_out_channel_by_channel():
    """An image weighs as the share of its pixels that are there."""
    arrays = noise(8, (10, 10, 3), np.float32)
    for i, array in enumerate(arrays):
        array[: i + 1, :, 0] = NAN
        array[:, i, 1] = NAN
    arrays[0][:] = NAN
    pixels = np.stack(arrays).reshape(-1, 3).astype(np.float64)
    mean, std, _ = estimate(arrays)
    assert mean == pytest.approx(np.nanmean(pixels, 0), rel=1e-5)
    assert std == pytest.approx(np.nanstd(pixels, 0), rel=1e-5)
    found = survey(Arrays(arrays), 3, 0, MANY)
    assert found.missing == pytest.approx(np.isnan(pixels).mean())
    assert found.empty == 1


def test_a_dead_channel_is_named_and_left_as_it_is():
    """Constant, or without data: no division by 0, and no refusal."""
    arrays = noise(5, (6, 6, 4), np.float32, top=3)
    for array in arrays:
        array[..., 1], array[..., 3] = 0.1, NAN
    mean, std, warnings = estimate(arrays, channels=4)
    assert mean[1] == pytest.approx(0.1)
    assert (mean[3], std[1], std[3]) == (0, 1, 1)
    assert len(warnings) == 2
    assert "channel 1 (the first is 0) of arrays is constant, 0.1 in all 5 images" in warnings[0]
    assert "channel 3 (the first is 0) of arrays holds no data in all 5 images" in warnings[1]
    large = [np.concatenate([a[..., :1] * 500, np.full_like(a[..., :1], 9e3)], -1) for a in arrays]
    assert estimate(large, channels=2)[1][1] == 9e3  # else jitter would make thousands of it


def test_estimates_refuse_what_has_none():
    with pytest.raises(UserError, match=r"all of 5 images .* are constant.*nothing to learn"):
        estimate([np.full((4, 4, 3), 128, np.uint8)] * 5)
    with pytest.raises(UserError, match="constant"):
        estimate([np.full((4, 4, 3), NAN, np.float32)] * 5)


# --- what images they are -----------------------------------------------------------------------


def test_depth_is_that_of_a_bounded_sample():
    """Deeper images behind 8-bit ones are seen; 8-bit ones with missing pixels are no deeper ones,
    as they come in floats of 0..1."""
    whole = noise(40, (6, 6, 3))
    holed = (whole[0] / 255).astype(np.float32)
    holed[:2] = NAN
    deep = whole[0].astype(np.uint16) * 200
    floats = np.where(np.isnan(holed), NAN, holed * 0.77).astype(np.float32)
    for array, expected in ((whole[0], 0), (holed, 0), (holed * 255, 1), (deep, 1), (floats, 1)):
        assert survey(Arrays([array]), 3, 0, FEW).deep == expected
    mixed = Arrays([*whole, *[deep] * 40])
    found = survey(mixed, 3, 0, FEW)
    assert 0 < found.deep < FEW
    assert mixed.reads == len(found) == FEW


def test_a_look_is_cheap_and_goes_on_until_one_is_readable():
    large = Arrays([np.zeros((700, 900, 3), np.uint8)])
    assert survey(large, 3, 0, FEW).rows[0].shape == (3, 3)
    some = Arrays([None] * 60 + noise(1))
    assert len(survey(some, 3, 0, FEW)) == 1
    many = Arrays(noise(30) + [None] * 30)
    found = survey(many, 3, 0, FEW)
    assert many.reads == FEW
    assert 0 < len(found) < FEW
    none = Arrays([None] * 500)
    with pytest.raises(UserError, match=r"none of 100 images of arrays can be read.*garbage"):
        survey(none, 3, 0, FEW).check()


@pytest.mark.parametrize(
    ("channels", "asked", "message"),
    [
        (4, 3, "of arrays have 4 channels; --data.channels is 3: give --data.channels 4"),
        (3, 4, "of arrays have 3 channels; --data.channels is 4: give --data.channels 3"),
        (2, 1, "of arrays have 2 channels; --data.channels is 1: give --data.channels 2"),
    ],
)
def test_other_channels_are_named_with_the_option(channels, asked, message):
    found = survey(Arrays(noise(3, (30, 30, channels))), asked, 0, FEW)
    with pytest.raises(UserError, match=message):
        found.check()
    with pytest.raises(
        UserError, match=f"{channels} channels; --encoder x takes images of {asked}"
    ):
        found.check("--encoder x")
    if channels > asked:
        with pytest.raises(UserError, match=f"{channels}, or choose {asked} by --data.bands$"):
            found.check()
        with pytest.raises(UserError, match=f"images of {asked}: choose {asked} by --data.bands$"):
            found.check("--encoder x")


def test_some_images_of_other_channels_are_bad_ones():
    """Where others fit, or another reason is among them, nothing is said of an option."""
    survey(Arrays([*noise(3, (30, 30, 4)), *noise(1)]), 3, 0, FEW).check()
    with pytest.raises(UserError, match="none of 2 images"):
        survey(Arrays([*noise(1, (30, 30, 4)), None]), 3, 0, FEW).check()


# --- values that do not fit ---------------------------------------------------------------------


def looked(mean: float, std: float, channels: int = 3) -> Survey:
    generator = torch.Generator().manual_seed(0)
    images = mean + std * torch.randn(8, channels, 20, 20, generator=generator)
    return survey_of(images, "images")


@pytest.mark.parametrize(
    ("mean", "std", "parts"),
    [
        (1487.0, 301.0, ("have mean 14", "and deviation 30", "values around 6,", "mean 0.456")),
        (0.0229, 0.0046, ("around -1.7 with deviation 0.02",)),  # 12 bits of reflectance in 16
        (0.45, 4.0, ("deviation 1", "where 0 and 1 are usual")),
    ],
)
def test_values_far_from_the_statistics_are_named(mean, std, parts):
    said = looked(mean, std).misfit(IMAGENET_MEAN, IMAGENET_STD)
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("mean", "std"), [(0.45, 0.25), (0.02, 0.03), (0.97, 0.1), (0.1, 0.3), (0.0, 0.0)]
)
def test_values_that_fit_are_not(mean, std):
    """Photographs, the darkest and brightest too; a constant gives no reason."""
    assert looked(mean, std).misfit(IMAGENET_MEAN, IMAGENET_STD) == ""


def test_the_worst_channel_is_named():
    images = torch.rand(4, 3, 9, 9)
    images[:, 1] *= 1e4
    assert "in channel 1 (the first" in survey_of(images, "x").misfit((0.5,) * 3, (0.3,) * 3)
    images[:, 1] = NAN
    assert survey_of(images, "x").misfit((0.5,) * 3, (0.3,) * 3) == ""
