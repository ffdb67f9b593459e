"""Dense targets: a map is cut out exactly where its image is, however it is flipped and turned."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Subset
from ssl_vit.data.dense import TARGET, DenseImages, cut_map
from ssl_vit.data.pairs import open_pairs

SIZE = (24, 40)


@pytest.fixture
def pairs(tmp_path):
    """Images whose red value is the class of each pixel, in blocks that survive resizing."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(6):
        blocks = rng.integers(0, 8, (5, 6)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        Image.fromarray(np.stack([blocks * 30] * 3, 2)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(blocks).save(tmp_path / f"masks/{i}.png")
    return open_pairs(f"pairs:{tmp_path}")


def images_of(source, **crop):
    spec = ViewSpec((Crop(SIZE, **crop),))
    return DenseImages(source, spec, 3, 0, lambda mask: mask.int(), -1)


@pytest.mark.parametrize(
    "crop",
    [
        {"scale": (0.1, 0.6), "flip": 0.0},
        {"scale": (0.3, 1.0), "flip": 0.5, "vertical_flip": 0.5},
        {"scale": (0.3, 1.0), "flip": 0.5, "vertical_flip": 0.5, "quarter_turns": 0.7},
    ],
    ids=["crops", "flips", "turns"],
)
def test_a_map_is_cut_out_as_its_image_is(pairs, crop):
    """Inside of blocks, where no value is interpolated, the image tells each pixel's class."""
    batch = images_of(pairs, **crop).__getitems__([(e, i) for e in range(8) for i in range(6)])
    target, image = batch.views.drawn[TARGET], batch.views.crops[0][:, 0].float() / 30
    assert target.shape == (48, *SIZE)
    inside = (image - image.round()).abs() < 0.01
    for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        inside &= (image.roll(shift, (1, 2)) - image).abs() < 0.01
    assert inside.float().mean() > 0.1
    assert (target[inside] == image.round()[inside].int()).all()


def test_parts_of_a_source_have_their_own_maps(pairs):
    part = Subset(pairs, np.array([4, 2]))
    views = images_of(part, scale=(1.0, 1.0), flip=0.0).__getitems__([(0, 0), (0, 1)]).views
    for row, i in enumerate((4, 2)):
        expected = cut_map(pairs.target(i), views.boxes[0][row], SIZE)
        assert (views.drawn[TARGET][row] == expected).all()


def test_a_map_in_its_own_size_is_itself():
    values = torch.arange(30).view(5, 6)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    assert (cut_map(values, whole, (5, 6)) == values).all()
    inner = torch.tensor([1 / 5, 2 / 6, 3 / 5, 3 / 6, 0.0])
    assert (cut_map(values, inner, (3, 3)) == values[1:4, 2:5]).all()


def test_a_map_that_cannot_be_read_is_told_and_teaches_nothing(pairs, tmp_path):
    (tmp_path / "masks" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    batch = images_of(pairs).__getitems__([(0, 2), (0, 3)])
    assert (batch.views.drawn[TARGET][1] == -1).all()
    assert (batch.views.drawn[TARGET][0] >= 0).all()
    (said,) = batch.bad.values()
    assert said.startswith(f"mask {tmp_path}/masks/3.png: ")
