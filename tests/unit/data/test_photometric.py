"""Photometric operations against torchvision's and PIL's, and the distribution of what is drawn."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as tvf

from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data import photometric as module
from ssl_vit.data.photometric import WIDTH, Photometric, left_out, photometric

NONE = [1.0, 1.0, 1.0, 0.0, -1.0, 1.0, 2.0, 0.0, 0.0, 0.0]
DINO = Photometric(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2)
ALL = Photometric(jitter=1.0, gray=0.3, blur=0.7, solarize=0.4)
# A row's names: factors or shift, places after hue, and the rest.
AT = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3, "gray": 7, "sigma": 8, "sol": 9}


def noise(n: int = 1, channels: int = 3, height: int = 24, width: int = 31) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(n))


def only(**values: float) -> list[float]:
    row = list(NONE)
    for name, value in values.items():
        row[AT[name]] = value
    return row


def draws(spec: Photometric, n: int) -> torch.Tensor:
    rng = random.Random(0)
    return torch.tensor([spec.draw(rng) for _ in range(n)])


def apply(images: torch.Tensor, rows: torch.Tensor, bounded: bool = True) -> torch.Tensor:
    """On a copy, as the images may be overwritten."""
    return photometric(images.clone(), rows, bounded)


def jitter_order(row: list[float]) -> tuple[int, ...]:
    """Which of brightness, contrast, saturation, hue comes first, second, third, last."""
    place = [*row[4:7], 0.0]
    return tuple(sorted(range(4), key=place.__getitem__))


def reference(image: torch.Tensor, row: list[float]) -> torch.Tensor:
    """One image by torchvision's functions, one after the other."""
    change: list[Callable] = [
        tvf.adjust_brightness,
        tvf.adjust_contrast,
        tvf.adjust_saturation,
        tvf.adjust_hue,
    ]
    for i in jitter_order(row):
        if row[i] != NONE[i]:
            image = change[i](image, row[i])
    if row[7]:
        image = tvf.rgb_to_grayscale(image, image.shape[0])
    if row[8]:
        height, width = image.shape[1:]
        image = tvf.gaussian_blur(image, [2 * width - 1, 2 * height - 1], [row[8], row[8]])
    return tvf.solarize(image, 128 / 255) if row[9] else image


@pytest.fixture(params=["subset", "small subsets", "where"])
def branch(request, monkeypatch) -> str:
    """The ways of changing some images of a batch: the CPU's, and that of every other device."""
    if request.param == "where":
        monkeypatch.setattr(module, "_subset", module._masked)
    if request.param == "small subsets":
        monkeypatch.setattr(module, "_IN_CACHE", 5000)
    return request.param


# --- what is drawn ------------------------------------------------------------------------------


def test_draws_have_one_length_and_move_the_generator_equally_far():
    specs = [Photometric(), DINO, ALL, Photometric(jitter=1.0, hue=0.0, blur_sigma=(3.0, 3.0))]
    rngs = [random.Random(7) for _ in specs]
    for _ in range(50):
        rows = [spec.draw(rng) for spec, rng in zip(specs, rngs, strict=True)]
        assert {len(row) for row in rows} == {WIDTH}
    assert len({rng.random() for rng in rngs}) == 1


def test_operations_are_drawn_with_their_probabilities():
    n = 20000
    spec = Photometric(jitter=0.8, gray=0.2, blur=0.5, solarize=0.1)
    rows = draws(spec, n)
    wanted = {0: 0.8, 1: 0.8, 2: 0.8, 3: 0.8, 7: 0.2, 8: 0.5, 9: 0.1}
    for column, p in wanted.items():
        share = (rows[:, column] != NONE[column]).float().mean().item()
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    jittered = (rows[:, :4] != torch.tensor(NONE[:4])).sum(1)
    assert set(jittered.tolist()) == {0, 4}
    both = ((rows[:, 7] > 0) & (rows[:, 8] > 0)).float().mean().item()
    assert both == pytest.approx(0.1, abs=0.01)
    assert torch.equal(
        draws(Photometric(), 100)[:, [0, 1, 2, 3, 7, 8, 9]].unique(dim=0),
        torch.tensor(NONE)[None, [0, 1, 2, 3, 7, 8, 9]],
    )


@pytest.mark.parametrize(
    ("column", "low", "high"),
    [(0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1), (8, 0.1, 2.0)],
)
def test_strengths_are_uniform_in_their_ranges(column, low, high):
    """The distribution function is within Kolmogorov and Smirnov's bound of one in a thousand."""
    n = 5000
    drawn = draws(Photometric(jitter=1.0, blur=1.0), n)[:, column].double().sort().values
    assert drawn[0] >= low - 1e-6
    assert drawn[-1] <= high + 1e-6
    share = (drawn - low) / (high - low)
    assert (share - torch.arange(n) / n).abs().max() < 1.95 / math.sqrt(n)


def test_factors_are_never_negative():
    """A strength above 1 ends at 0, as torchvision's does."""
    rows = draws(Photometric(jitter=1.0, brightness=3.0), 2000)
    assert 0 <= rows[:, 0].min() < 0.02
    assert rows[:, 0].max() > 3.9


def test_the_orders_of_jitter_are_equally_likely():
    """All 24; chi-square with 23 degrees of freedom, one in a thousand by chance."""
    n = 12000
    counts = Counter(jitter_order(row) for row in draws(Photometric(jitter=1.0), n).tolist())
    assert set(counts) == set(itertools.permutations(range(4)))
    assert sum((c - n / 24) ** 2 / (n / 24) for c in counts.values()) < 49.7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jitter": 1.1}, "jitter is 1.1; allowed: 0 to 1"),
        ({"gray": -0.1}, "gray is -0.1"),
        ({"blur": math.nan}, "blur is nan"),
        ({"solarize": 2.0}, "solarize is 2.0"),
        ({"contrast": -1.0}, "contrast is -1.0"),
        ({"hue": 0.6}, "hue is 0.6; allowed: 0 to 0.5"),
        ({"blur_sigma": (0.0, 1.0)}, "from 0.0 to 1.0"),
        ({"blur_sigma": (2.0, 1.0)}, "from 2.0 to 1.0"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        Photometric(**options)


# --- each operation -----------------------------------------------------------------------------

OPERATIONS = [
    *[("brightness", f, lambda x, f=f: tvf.adjust_brightness(x, f)) for f in (0, 0.6, 1.4, 2)],
    *[("contrast", f, lambda x, f=f: tvf.adjust_contrast(x, f)) for f in (0, 0.6, 1.4, 2)],
    *[("saturation", f, lambda x, f=f: tvf.adjust_saturation(x, f)) for f in (0, 0.8, 1.2, 2)],
    *[("hue", h, lambda x, h=h: tvf.adjust_hue(x, h)) for h in (-0.5, -0.1, 0.04, 0.3, 0.5)],
    ("gray", 1, lambda x: tvf.rgb_to_grayscale(x, x.shape[-3])),
    *[("sigma", s, lambda x, s=s: tvf.gaussian_blur(x, 47, [s, s])) for s in (0.1, 0.5, 2)],
    ("sol", 1, lambda x: tvf.solarize(x, 128 / 255)),
]


@pytest.mark.parametrize(("name", "value", "theirs"), OPERATIONS)
def test_an_operation_is_torchvisions(name, value, theirs, branch):
    """Of noise, gray, pure colours and black; the second image of a batch, others untouched."""
    images = noise(3)
    images[1, :, :4] = images[1, :1, :4]
    pure = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    images[1, :, 4:6, :8] = pure.T[:, None]
    rows = torch.tensor([NONE, only(**{name: value}), NONE])
    out = apply(images, rows)
    torch.testing.assert_close(out[1], theirs(images[1]), rtol=0, atol=1e-5)
    assert torch.equal(out[[0, 2]], images[[0, 2]])


def test_blur_reflects_at_edges_as_torchvisions_does(branch):
    """Each image by its own sigma, with a kernel as wide as the image lets it be."""
    sigmas = (0.1, 0.7, 2.0, 6.0)
    for height, width in ((12, 12), (9, 20), (16, 1), (2, 3)):
        images = noise(len(sigmas), 3, height, width)
        out = apply(images, torch.tensor([only(sigma=s) for s in sigmas]))
        for image, ours, s in zip(images, out, sigmas, strict=True):
            theirs = tvf.gaussian_blur(image, [2 * width - 1, 2 * height - 1], [s, s])
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_solarise_inverts_from_level_128_on():
    """Of all 256 levels as they come from 8-bit images."""
    levels = torch.arange(256).float().mul(1 / 255).view(1, 1, 16, 16)
    out = apply(levels, torch.tensor([only(sol=1)]))
    expected = [i if i < 128 else 255 - i for i in range(256)]
    torch.testing.assert_close(out.flatten() * 255, torch.tensor(expected) * 1.0, rtol=0, atol=1e-4)


# --- all together -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
def test_all_operations_in_their_drawn_order(channels, branch):
    """A batch against a loop over its images, by torchvision (which knows 1 and 3 channels)."""
    images, rows = noise(60, channels), draws(ALL, 60)
    assert len({jitter_order(row) for row in rows.tolist()}) > 15
    out = apply(images, rows)
    assert out.min() >= -1e-6
    assert out.max() <= 1 + 1e-6
    for image, ours, row in zip(images, out, rows.tolist(), strict=True):
        if channels == 1:
            row[2], row[3], row[7] = 1.0, 0.0, 0.0
        # Values near the threshold may lie on either side of it.
        near = (reference(image, [*row[:9], 0.0]) - 128 / 255).abs() < 1e-5
        apart = (ours - reference(image, row)).abs()
        assert apart[~near].max() < 2e-5
        assert near.float().mean() < 0.01


def test_the_reference_tells_orders_apart():
    """What the test above would see if operations came in another order."""
    image, row = noise()[0], [1.4, 1.4, 1.2, 0.1, -3.0, -2.0, -1.0, 0.0, 0.0, 0.0]
    outs = []
    for place in itertools.permutations(range(4)):
        row[4:7] = [float(p - place[3]) for p in place[:3]]
        outs.append(reference(image, row))
        ours = apply(image[None], torch.tensor([row]))[0]
        torch.testing.assert_close(ours, outs[-1], rtol=0, atol=2e-5)
    apart = [(a - b).abs().max().item() for a, b in itertools.combinations(outs, 2)]
    assert np.median(apart) > 1e-2


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_the_two_ways_of_changing_some_images_agree(channels, bounded, monkeypatch):
    images, rows = noise(40, channels), draws(DINO, 40)
    subset = apply(images, rows, bounded)
    monkeypatch.setattr(module, "_subset", module._masked)
    torch.testing.assert_close(apply(images, rows, bounded), subset, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_no_operation_looks_at_numbers_on_a_device(channels):
    """Tensors without any, as the meta device has them, would raise where a GPU would wait."""
    images = torch.empty(4, channels, 8, 9, device="meta")
    for bounded in (True, False):
        out = photometric(images, torch.empty(4, WIDTH, device="meta"), bounded)
        assert out.shape == images.shape
        assert out.dtype == images.dtype


def test_nothing_drawn_changes_nothing(branch):
    images, rows = noise(5), draws(Photometric(), 5)
    assert torch.equal(apply(images, rows), images)


# --- other images than 8-bit RGB ----------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 5])
def test_other_channel_counts_have_contrast_about_each_channels_mean(channels, branch):
    """Brightness and contrast by their formulas; saturation, hue and grayscale do nothing."""
    images = noise(2, channels)
    row = only(contrast=1.3, saturation=0.5, hue=0.2, gray=1)
    out = apply(images, torch.tensor([row, only(brightness=1.2)]))
    mean = images[0].mean((1, 2), keepdim=True)
    torch.testing.assert_close(out[0], (1.3 * images[0] - 0.3 * mean).clamp(0, 1))
    torch.testing.assert_close(out[1], (1.2 * images[1]).clamp(0, 1))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_deeper_images_are_neither_clamped_nor_solarised(channels, branch):
    """Of any range: here -3000 to 7000."""
    images = noise(1, channels) * 10000 - 3000
    row = torch.tensor([only(brightness=1.4, contrast=1.3, sol=1)])
    bright = images * 1.4
    luma = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]
    gray = (bright * luma).sum(1, keepdim=True) if channels == 3 else bright
    expected = 1.3 * bright - 0.3 * gray.mean((2, 3), keepdim=True)
    torch.testing.assert_close(apply(images, row, bounded=False), expected, rtol=1e-4, atol=1e-2)
    # A sum of weights other than 1 (0.9999) apart, blur and hue move with the images' range.
    rows = torch.tensor([only(hue=0.1, sigma=1.0)])
    scaled = apply((images + 3000) / 10000, rows, bounded=False) * 10000 - 3000
    torch.testing.assert_close(apply(images, rows, bounded=False), scaled, rtol=1e-4, atol=1e-1)


def test_what_cannot_be_applied_is_named():
    names = ["saturation", "hue", "grayscale", "solarise"]
    assert left_out(DINO, 3, bounded=True) == []
    assert left_out(DINO, 1, bounded=True) == names[:3]
    assert left_out(DINO, 5, bounded=False) == names
    assert left_out(DINO, 3, bounded=False) == names[3:]
    assert left_out(Photometric(), 5, bounded=False) == []
    assert left_out(Photometric(jitter=1.0, saturation=0.0, gray=0.1), 1, True) == [
        "hue",
        "grayscale",
    ]


# --- PIL, which the original runs on ------------------------------------------------------------


def pil_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(i + round(turns * 255)) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@pytest.mark.parametrize(
    ("row", "theirs", "levels"),
    [
        (only(brightness=1.3), lambda x: ImageEnhance.Brightness(x).enhance(1.3), 1),
        (only(contrast=0.7), lambda x: ImageEnhance.Contrast(x).enhance(0.7), 2),
        (only(saturation=1.2), lambda x: ImageEnhance.Color(x).enhance(1.2), 2),
        (only(hue=0.1), lambda x: pil_hue(x, 0.1), 6),
        (only(gray=1), lambda x: x.convert("L").convert("RGB"), 1),
        (only(sigma=1.5), lambda x: x.filter(ImageFilter.GaussianBlur(1.5)), 3),
        (only(sol=1), lambda x: ImageOps.solarize(x), 0),
    ],
)
def test_pil_agrees_to_a_few_gray_levels(row, theirs, levels):
    """On a smooth picture, away from its edges: PIL's blur repeats them, and rounds to levels."""
    y, x = np.mgrid[0:48, 0:60]
    waves = [np.sin(x / 9 + k) * np.cos(y / 7 - k) for k in range(3)]
    array = np.round(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)
    images = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    ours = apply(images, torch.tensor([row]))[0].permute(1, 2, 0).numpy() * 255
    apart = np.abs(ours - np.asarray(theirs(Image.fromarray(array)), dtype=float))
    assert apart[8:-8, 8:-8].max() <= levels + 0.51


class Moved(TorchDispatchMode):
    """Bytes that are read and written; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.index_select.default, torch.ops.aten.index_copy_.default):
            self.bytes += 2 * (args[3] if "copy" in function.__name__ else out).nbytes
            return out
        aliases = [r.alias_info for r in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors if t.device.type == "meta")
        return out


def test_a_device_changes_only_images_that_the_host_has_drawn_it_for():
    """Less than half of the bytes of changing all and choosing; nothing is asked of the device."""
    rows, bytes_moved = draws(DINO, 64), []
    for where in ("cpu", "meta"):
        images = torch.empty(64, 3, 96, 96, device="meta")
        with Moved() as moved:
            assert photometric(images, rows.to(where), True).shape == images.shape
        bytes_moved.append(moved.bytes / 64)
    assert bytes_moved[0] < 0.5 * bytes_moved[1], bytes_moved
    with Moved() as moved:
        photometric(images, torch.tensor([NONE] * 64), True)
    assert moved.bytes == 0, "for none of them anything is drawn"


def test_photometric_parameters_stay_with_the_host_on_the_way_to_cuda():
    rows = draws(DINO, 2)
    crops = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    views = Views([crops], torch.zeros(2).long(), torch.zeros(2).long(), [rows])
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = views.to(torch.device("cuda", 0))
    assert there.crops[0].device.type == "cuda"
    assert there.photometric[0] is rows
