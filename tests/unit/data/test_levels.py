"""Levels against a loop over images, channels and pixels, and the distribution of what is drawn."""

import dataclasses
import math
import random

import pytest
import torch

from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold_keys, uniform
from ssl_vit.common.task import Views
from ssl_vit.data import levels as levels_module
from ssl_vit.data import photometric as photometric_module
from ssl_vit.data.augment import Crop, draw_cut
from ssl_vit.data.levels import LEVELS_WIDTH, Levels, levels, normal, of_channels
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.photometric import WIDTH, Photometric

ALL = Levels(together=0.8, each=0.7, drop=0.3, noise=0.2)


def draws(spec: Levels, n: int) -> torch.Tensor:
    rng = random.Random(0)
    return torch.tensor([spec.draw(rng) for _ in range(n)])


def images(n: int, channels: int, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(n))


def near_uniform(values: torch.Tensor, low: float, high: float) -> None:
    """Within Kolmogorov and Smirnov's bound of one in a thousand."""
    share = (values.double().sort().values - low) / (high - low)
    n = len(share)
    assert -1e-6 < share[0] <= share[-1] < 1 + 1e-6
    assert (share - torch.arange(n) / n).abs().max() < 1.95 / math.sqrt(n)


@pytest.fixture(params=["subset", "small subsets", "where"])
def branch(request, monkeypatch) -> None:
    """The ways of changing some images of a batch: the CPU's, and that of every other device."""
    if request.param == "where":
        monkeypatch.setattr(photometric_module, "_subset", photometric_module._masked)
    if request.param == "small subsets":
        monkeypatch.setattr(photometric_module, "_IN_CACHE", 200)
        monkeypatch.setattr(levels_module, "_AT_ONCE", 200)


# --- what is drawn ------------------------------------------------------------------------------


def test_draws_have_one_length_and_move_the_generator_equally_far():
    specs = [Levels(), ALL, Levels(noise=3.0), Levels(drop=1.0, gain=0.0, shift=2.0)]
    rngs = [random.Random(7) for _ in specs]
    for _ in range(50):
        rows = [spec.draw(rng) for spec, rng in zip(specs, rngs, strict=True)]
        assert {len(row) for row in rows} == {LEVELS_WIDTH}
    assert len({rng.random() for rng in rngs}) == 1


def test_they_come_after_all_other_draws_and_where_they_are_off_there_are_none():
    """A crop is the same with them and without; the generator is where it was without."""
    plain = Crop((8, 8), photometric=Photometric(jitter=0.5), vertical_flip=0.5, quarter_turns=0.5)

    def cut(crop: Crop, seed: int):
        rng = random.Random(seed)
        return draw_cut(30, 40, crop, rng, policies=False), rng.random()

    for seed in range(20):
        before, after = cut(plain, seed)
        assert cut(dataclasses.replace(plain, levels=Levels()), seed) == (before, after)
        with_levels, _ = cut(dataclasses.replace(plain, levels=ALL), seed)
        assert len(with_levels.photometric) == WIDTH + LEVELS_WIDTH
        assert with_levels._replace(photometric=before.photometric) == before
        assert with_levels.photometric[:WIDTH] == before.photometric
    alone, _ = cut(dataclasses.replace(plain, photometric=None, levels=ALL), 0)
    assert len(alone.photometric) == WIDTH + LEVELS_WIDTH


def test_contrast_and_brightness_are_uniform_and_of_their_probability():
    n = 5000
    rows = draws(Levels(together=0.6), n)
    on = rows[:, 0] != 1
    assert torch.equal(on, rows[:, 1] != 0)
    assert on.float().mean().item() == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / n))
    near_uniform(rows[on, 0], 0.6, 1.4)
    near_uniform(rows[on, 1], -0.5, 0.5)
    gain, shift, noise = of_channels(rows, 3)
    assert torch.equal(gain, rows[:, :1].expand(-1, 3))
    assert torch.equal(shift, rows[:, 1:2].expand(-1, 3))
    assert not noise.any()


def test_each_channel_has_its_own():
    """Uniform in the same ranges, of the given probability, and independent of each other."""
    n = 5000
    gain, shift, _ = of_channels(draws(Levels(each=0.7), n), 3)
    on = (gain != 1).any(1)
    assert on.float().mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / n))
    assert torch.equal(on, (shift != 0).any(1))
    for channel in range(3):
        near_uniform(gain[on, channel], 0.6, 1.4)
        near_uniform(shift[on, channel], -0.5, 0.5)
    both = torch.cat([gain[on], shift[on]], 1).T
    apart = torch.corrcoef(both) - torch.eye(6)
    assert apart.abs().max() < 4.5 / math.sqrt(int(on.sum()))


@pytest.mark.parametrize("channels", [1, 2, 13])
@pytest.mark.parametrize("p", [0.1, 0.6, 1.0])
def test_channels_are_dropped_one_by_one_and_never_all(channels, p):
    """Each of probability p, but that of all of them one stays, whichever."""
    n = 4000
    gain, shift, noise = of_channels(draws(Levels(drop=p, noise=0.5), n), channels)
    dropped = gain == 0
    assert torch.equal(dropped, noise == 0)
    assert not shift.any()
    assert not dropped.all(1).any()
    expected = p - p**channels / channels
    spread = math.sqrt(max(expected * (1 - expected), 0.0) / n)
    shares = dropped.double().mean(0)
    assert (shares - expected).abs().max().item() <= 4.5 * spread + 1e-9


def test_noise_is_gaussian_of_a_uniform_deviation():
    rows = draws(Levels(noise=0.2), 3000)
    near_uniform(rows[:, 5], 0.0, 0.2)
    drawn = normal(torch.arange(50), 801).double()
    assert drawn.shape == (50, 801)
    n, values = drawn.numel(), drawn.flatten().sort().values
    share = torch.special.ndtr(values)
    assert (share - torch.arange(n) / n).abs().max() < 1.95 / math.sqrt(n)
    assert torch.corrcoef(drawn[:10]).fill_diagonal_(0).abs().max() < 4.5 / math.sqrt(801)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"together": 1.1}, "together of levels is 1.1; allowed: 0 to 1"),
        ({"drop": math.nan}, "drop of levels is nan"),
        ({"noise": -1.0}, "noise of levels is -1.0; allowed: 0 and more"),
        ({"shift": math.inf}, "shift of levels is inf"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(UserError) as refused:
        Levels(**options)
    assert said in str(refused.value)


# --- what is done -------------------------------------------------------------------------------


def reference(image: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """One image (C, H, W), channel by channel and pixel by pixel."""
    gain, shift, own_gain, own_shift, drop, noise, key = row.tolist()
    count, out = len(image), torch.zeros_like(image)
    keys = [fold_keys(torch.tensor([int(key)]), which) for which in (0, 1)]
    shares = uniform(keys[0], 3 * count)[0].tolist()
    drawn = normal(keys[1], image.numel())[0].view_as(image)
    last = max(range(count), key=lambda c: shares[2 * count + c])
    for c in range(count):
        if shares[2 * count + c] < drop and c != last:
            continue
        factor = gain * (1 + own_gain * (2 * shares[c] - 1))
        summand = shift + own_shift * (2 * shares[count + c] - 1)
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                out[c, y, x] = factor * image[c, y, x] + summand + noise * drawn[c, y, x]
    return out


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_batch_is_its_images_one_by_one(channels, branch):
    given, rows = images(12, channels), draws(ALL, 12)
    made = levels(given.clone(), rows)
    for image, row, found in zip(given, rows, made, strict=True):
        torch.testing.assert_close(found, reference(image, row), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(made, given, atol=0.1)


def test_nothing_drawn_changes_nothing(branch):
    given = images(5, 3)
    assert torch.equal(levels(given.clone(), draws(Levels(), 5)), given)


def test_an_images_noise_is_its_own_wherever_it_lies():
    """In another batch the same to the bit; another crop of the same pixels has another."""
    given, rows = images(1, 2).expand(6, -1, -1, -1), draws(Levels(noise=0.3), 6)
    made = levels(given.clone(), rows)
    some = torch.tensor([4, 1])
    assert torch.equal(levels(given[some].clone(), rows[some]), made[some])
    assert not torch.allclose(made[0] - given[0], made[1] - given[1], atol=1e-3)


# --- with the rest of the device half -----------------------------------------------------------


def views(crops: torch.Tensor, rows: torch.Tensor, missing: list[torch.Tensor] | None = None):
    keys = torch.arange(len(crops))
    return Views([crops], keys, keys, [rows], missing=missing or [])


def full(spec: Levels, n: int, photometric: Photometric | None = None) -> torch.Tensor:
    rng = random.Random(0)
    rows = [[*(photometric or Photometric()).draw(rng), *spec.draw(rng)] for _ in range(n)]
    return torch.tensor(rows)


def test_they_are_the_same_in_other_units():
    """Kelvin or Celsius, counts or shares: normalised by their own statistics all are alike."""
    given, rows = images(8, 2), full(ALL, 8)
    celsius = given * 15 + 7
    made = [
        Normalize((mean,) * 2, (std,) * 2, bounded=False)(views(x, rows)).crops[0]
        for x, mean, std in ((celsius, 7.0, 15.0), (celsius + 273, 280.0, 15.0), (given, 0.0, 1.0))
    ]
    torch.testing.assert_close(made[0], made[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made[0], made[2], rtol=1e-4, atol=1e-4)


def test_they_come_after_photometric_operations_and_normalisation():
    colour, mean, std = Photometric(jitter=1.0, blur=0.5), (0.4,) * 3, (0.2,) * 3
    crops = (torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 255).byte()
    normalize, rows = Normalize(mean, std), full(ALL, 6, colour)
    first = normalize(views(crops, rows[:, :WIDTH])).crops[0]
    made = normalize(views(crops, rows)).crops[0]
    torch.testing.assert_close(made, levels(first.clone(), rows[:, WIDTH:]))
    assert not torch.allclose(made, first, atol=0.1)


def test_missing_pixels_stay_missing():
    given = images(6, 3)
    missing = torch.rand(given.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    spec = Levels(together=1.0, each=1.0, noise=0.3)
    normalize = Normalize((0.0,) * 3, (1.0,) * 3, bounded=False)
    holed = views(given.masked_fill(missing, math.nan), full(spec, 6), [missing])
    made = normalize(holed).crops[0]
    whole = normalize(views(given, full(spec, 6))).crops[0]
    assert not made[missing].any()
    torch.testing.assert_close(made[~missing], whole[~missing])
