"""Missing pixels: what resizing makes of them, which crops are taken, what the device is given."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ssl_vit.common.reading import ReadConfig
from ssl_vit.common.seeds import fold
from ssl_vit.common.task import Views
from ssl_vit.data import reduced
from ssl_vit.data.augment import Crop, ViewSpec, center_view, take_views
from ssl_vit.data.base import Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.eval_images import EvalImages, eval_batches
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.missing import has_missing, missing_in, resized, valid_share
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.order import Order
from ssl_vit.data.photometric import Photometric
from ssl_vit.data.reduced import views_of
from ssl_vit.data.sources import open_source

NAN = float("nan")
COLOUR = Photometric(jitter=1.0, gray=0.5, blur=1.0)


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 9 + 100


def holed(image: torch.Tensor, share: float = 0.2) -> torch.Tensor:
    """With a block missing in all channels, a band in one, and single pixels."""
    image, (_, height, width) = image.clone(), image.shape
    single = torch.rand(image.shape, generator=torch.Generator().manual_seed(5)) < share
    image[single] = NAN
    image[:, : height // 3, : width // 2] = NAN
    image[-1, height // 2 :] = NAN
    return image


# --- resizing -----------------------------------------------------------------------------------


def kernel(old: int, new: int) -> torch.Tensor:
    """Weights (new, old) of resizing one side, float64: what it makes of each unit vector."""
    eye = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(eye, (new, old), mode="bicubic", antialias=True)[0, 0]


@pytest.mark.parametrize("size", [(7, 9), (40, 50), (13, 31), (17, 40)])
def test_a_resized_pixel_is_the_mean_of_the_valid_ones_by_their_weights(size):
    """Smaller, larger, and one side kept; missing where less than half of the weight is valid."""
    image = holed(picture(3, 20, 31))
    valid = ~image.isnan()
    down, right = kernel(20, size[0]), kernel(31, size[1])
    total = down @ image.nan_to_num(0).double() @ right.T
    weight = down @ valid.double() @ right.T
    found = resized(image, size)
    sure = (weight - 0.5).abs() > 1e-5
    assert torch.equal(found.isnan()[sure], (weight < 0.5)[sure])
    there = ~found.isnan()
    assert 0 < there.sum() < there.numel()
    torch.testing.assert_close(found[there].double(), (total / weight)[there], rtol=1e-5, atol=0)


def test_what_stands_in_missing_pixels_does_not_matter_and_constants_stay():
    """Nothing of a value of -9999 is left, nor of one far away."""
    image = holed(torch.full((2, 30, 40), 7.25))
    found = resized(image, (12, 13))
    assert 0 < int(found.isnan().sum()) < found.numel()
    torch.testing.assert_close(found.nan_to_num(7.25), torch.full_like(found, 7.25))


def test_far_from_missing_pixels_nothing_changes():
    image = picture(3, 64, 64)
    plain = resized(image, (16, 16))
    image[:, :16] = NAN
    found = resized(image, (16, 16))
    torch.testing.assert_close(found[:, 8:], plain[:, 8:])
    assert found[:, :4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_without_missing_pixels_every_bit_is_as_before(dtype):
    image = picture(3, 40, 57).to(dtype)
    expected = F.interpolate(image[None], (16, 24), mode="bicubic", antialias=True)[0]
    assert torch.equal(resized(image, (16, 24)), expected)
    assert torch.equal(center_view(image, (16, 16), 1.0), center_view(image.clone(), (16, 16), 1.0))


def test_eight_bit_images_are_not_looked_through(monkeypatch):
    """Nor is a float image looked through more than once, by a sum."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "isnan", lambda x: asked.append(x.numel()) or torch.isnan(x))
    spec = ViewSpec((Crop((8, 8), count=4),))
    take_views(picture(3, 40, 40).to(torch.uint8), spec, random.Random(0))
    assert not asked
    take_views(picture(3, 40, 40), spec, random.Random(0))
    assert asked == [1]


def test_missing_pixels_are_found():
    whole = picture(3, 5, 5)
    assert not has_missing(whole)
    assert not has_missing(torch.zeros(3, 5, 5, dtype=torch.uint8))
    huge = torch.tensor([3e38, 3e38, -3e38, -3e38])  # the sum is no number
    assert not has_missing(huge)
    whole[1, 2, 3] = NAN
    assert has_missing(whole)
    assert valid_share(whole) == 1  # of pixels with a value in any channel
    whole[:, 2, 3] = NAN
    assert valid_share(whole) == pytest.approx(24 / 25)


# --- training crops -----------------------------------------------------------------------------

SPEC = ViewSpec((Crop((8, 8), (0.1, 1.0), count=3), Crop((6, 4), (0.05, 0.3), count=2)))


def test_crops_without_missing_pixels_draw_as_before():
    """The generator is left where it was: only images with missing pixels may draw again."""
    image, rng, again = picture(3, 40, 50), random.Random(3), random.Random(3)
    crops = take_views(image, SPEC, rng)
    hundredth = take_views(image.round().to(torch.uint8), SPEC, again)
    assert rng.random() == again.random()
    for one, two in zip([*crops[0], *crops[1]], [*hundredth[0], *hundredth[1]], strict=True):
        assert one.place == two.place
        assert not one.missing


def test_a_crop_with_hardly_any_data_is_drawn_again():
    """Only a corner has data: every crop has some, holds its box, and follows from its key."""
    image = torch.full((3, 60, 60), NAN)
    image[:, :25, 35:] = picture(3, 25, 25)
    for key in range(30):
        kinds = take_views(image, SPEC, random.Random(key))
        again = take_views(image, SPEC, random.Random(key))
        for kind, crop, same in zip(kinds, SPEC.crops, again, strict=True):
            for made, repeated in zip(kind, same, strict=True):
                assert valid_share(made.crop) > 0
                assert made.missing == has_missing(made.crop)
                assert torch.equal(made.crop.nan_to_num(0), repeated.crop.nan_to_num(0))
                top, left, height, width, flip = made.place
                box = [round(v * 60) for v in (top, left, height, width)]
                part = image[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
                held = resized(part, crop.size)
                held = held.flip(-1) if flip else held
                assert torch.equal(held.nan_to_num(-1), made.crop.nan_to_num(-1))


def test_an_image_without_data_is_bad():
    with pytest.raises(BadImage, match="holds no data"):
        take_views(torch.full((3, 20, 20), NAN), SPEC, random.Random(0))
    sparse = torch.full((3, 200, 200), NAN)
    sparse[:, ::4, ::4] = 1.0
    with pytest.raises(BadImage, match=r"in 6.2 % of its pixels, and none of 10 crops"):
        take_views(sparse, ViewSpec((Crop((8, 8)),)), random.Random(0))


def test_a_channel_without_data_is_no_reason_to_draw_again():
    image, rng, again = picture(4, 40, 40), random.Random(1), random.Random(1)
    take_views(image, SPEC, rng)
    image[2] = NAN
    for made in take_views(image, SPEC, again)[0]:
        assert made.missing
        assert made.crop[2].isnan().all()
        assert not made.crop[[0, 1, 3]].isnan().any()
    assert rng.random() == again.random()


def test_a_value_for_missing_pixels_is_looked_for_at_full_size(tmp_path, monkeypatch):
    """A reduced JPEG has other values; where one of them means no data, it is decoded whole."""
    Image.new("RGB", (900, 900)).save(tmp_path / "a.jpg")
    raw = (tmp_path / "a.jpg").read_bytes()
    spec = ViewSpec((Crop((16, 16), (0.9, 1.0), flip=0.0),))
    reduced_views, calls = reduced._reduced_views, []
    noted = lambda *given: calls.append(1) or reduced_views(*given)  # noqa: E731
    monkeypatch.setattr(reduced, "_reduced_views", noted)
    for reading, tried in ((None, 1), (ReadConfig(), 2), (ReadConfig(nodata="300"), 2)):
        (crop,) = views_of(raw, 3, spec, 0, reading)[0]
        assert crop.crop.shape == (3, 16, 16)
        assert len(calls) == tried


# --- batches ------------------------------------------------------------------------------------


class Holed(Source):
    """Float images of four channels; every third has missing pixels, every seventh no others."""

    spec, classes, labels = "holed", None, None

    def __len__(self) -> int:
        return 21

    def read(self, i: int) -> tuple[np.ndarray, int | None]:
        image = picture(4, 24, 30, seed=i)
        image = holed(image, 0.05) if i % 3 == 0 else image
        image = image * NAN if i % 7 == 6 else image
        return image.permute(1, 2, 0).numpy(), None

    def name(self, i: int) -> str:
        return f"image-{i}"


def test_a_batch_knows_what_is_missing():
    """The worker says so, for every kind of crop; nothing where nothing is."""
    images = TrainImages(Holed(), SPEC, channels=4, seed=1)
    views = images.__getitems__([(0, 0), (0, 1)]).views
    assert [m.dtype for m in views.missing] == [torch.bool] * 2
    for missing, crops in zip(views.missing, views.crops, strict=True):
        assert torch.equal(missing, crops.isnan())
    assert views.missing[0][::2].any()
    assert not views.missing[0][1::2].any()
    assert images.__getitems__([(0, 1), (0, 2)]).views.missing == []


def test_an_image_without_data_is_named_and_replaced():
    batch = TrainImages(Holed(), SPEC, channels=4, seed=1).__getitems__([(0, 6), (0, 1)])
    assert batch.bad == {6: "image-6: holds no data"}
    assert batch.views.crops[0].shape == (6, 4, 8, 8)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_the_same_at_any_number_of_workers():
    source, order = Holed(), Order(21, 7, 1)
    images = TrainImages(source, SPEC, channels=4, seed=1)
    alone, helped = (list(train_batches(images, order, 0, 3, w, pin=False)) for w in (0, 2))
    assert any(batch.views.missing for batch in alone)
    for a, b in zip(alone, helped, strict=True):
        assert a.bad == b.bad
        for one, two in zip(a.views.tensors(), b.views.tensors(), strict=True):
            assert torch.equal(one.nan_to_num(0), two.nan_to_num(0))


def test_evaluation_leaves_out_what_holds_no_data():
    images = EvalImages(Holed(), (8, 8), 1.0, 4)
    found = list(eval_batches(images, 4, 0, pin=False))
    assert [len(b.views.missing) for b in found] == [1, 0, 1, 1, 1, 0]
    bad = {i: why for b in found for i, why in b.bad.items()}
    assert bad == {i: f"image-{i}: the central crop holds no data" for i in (6, 13, 20)}
    normalize = Normalize((100.0,) * 4, (3.0,) * 4)
    made = torch.cat([normalize(b.views).crops[0] for b in found if b.views.crops])
    assert made.isfinite().all()
    assert made.abs().max() < 5


def test_eight_bit_images_with_missing_pixels_share_a_batch_with_whole_ones(tmp_path):
    """These come as floats in 0..1, so the others are brought to that scale."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    some = (pixels / 255).astype(np.float32)
    some[:4] = NAN
    np.save(tmp_path / "b.npy", some)
    views = EvalImages(open_source(f"flat:{tmp_path}"), (8, 8), 1.0, 3).__getitems__([0, 1]).views
    one, two = Normalize((0.5,) * 3, (0.25,) * 3)(views).crops[0]
    assert torch.equal(two[:, :4], torch.zeros(3, 4, 8))
    torch.testing.assert_close(one[:, 4:], two[:, 4:])


# --- the device half ----------------------------------------------------------------------------


def batch_of(images: torch.Tensor, colour: bool) -> Views:
    n = len(images)
    drawn = [COLOUR.draw(random.Random(i)) if colour else [] for i in range(n)]
    keys = torch.tensor([fold(i) for i in range(n)])
    views = Views([images], keys, keys, [torch.tensor(drawn)])
    return dataclasses.replace(views, missing=missing_in([images]))


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_missing_pixels_are_the_mean_before_and_after_photometric_operations(colour, bounded):
    """As if the channel's mean had been there; then 0 again, as blur and jitter move them."""
    images = picture(4, 3, 16, 16) / 200
    some = torch.stack([holed(images[0]), images[1], holed(images[2]), images[3]])
    mean, std = (0.5, 0.52, 0.54), (0.1, 0.2, 0.3)
    normalize = Normalize(mean, std, bounded=bounded)
    found = normalize(batch_of(some, colour)).crops[0]
    filled = torch.where(some.isnan(), torch.tensor(mean)[:, None, None], some)
    expected = normalize(batch_of(filled, colour)).crops[0]
    expected[some.isnan()] = 0
    assert torch.equal(found, expected)
    assert found.isfinite().all()


def test_a_batch_without_missing_pixels_is_not_touched():
    images = picture(4, 3, 16, 16) / 200
    views = batch_of(images, colour=True)
    assert views.missing == []
    all_there = dataclasses.replace(views, missing=[torch.zeros_like(images, dtype=torch.bool)])
    normalize = Normalize((0.5,) * 3, (0.1,) * 3)
    one, two = normalize(views), normalize(all_there)
    assert torch.equal(one.crops[0], two.crops[0])
    assert torch.equal(two.missing[0], all_there.missing[0])


def test_images_alone_are_filled_too():
    """As for pictures and the library's face for notebooks, which have no batch of views."""
    image = holed(picture(3, 9, 9))[None]
    made = Normalize((100.0,) * 3, (2.0,) * 3).images(image)
    assert torch.equal(made == 0, image.isnan())
