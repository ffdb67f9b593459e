"""Small pictures of a source's images, whatever their depth and channels."""

import numpy as np
import pytest
import torch

from ssl_vit.data.base import Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.view import View
from ssl_vit.pictures.thumbnails import as_rgb, squared, thumbnails

VIEW = View((8, 12), 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


class Arrays(Source):
    """Arrays as images; None cannot be read."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays)

    def read(self, i):
        if self.arrays[i] is None:
            raise BadImage("broken")
        return self.arrays[i], None

    def name(self, i):
        return str(i)


def random(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_they_are_the_images_in_the_order_asked_for():
    images = [random(8, 12, 3, seed=i) for i in range(3)]
    made = thumbnails(Arrays(images), [2, 0], VIEW, side=64)
    np.testing.assert_array_equal(made, np.stack([images[2], images[0]]))


def test_large_ones_are_made_small():
    made = thumbnails(Arrays([random(80, 120, 3)]), [0], VIEW, side=6)
    assert made.shape == (1, 4, 6, 3)


def test_an_unreadable_one_is_gray():
    made = thumbnails(Arrays([None, random(8, 12, 3)]), [0, 1], VIEW, side=64)
    assert (made[0] == 128).all()
    assert made[1].std() > 10


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 3), (4, 1)])
def test_squares_for_the_projector(shape):
    pictures = np.zeros((2, *shape, 3), np.uint8)
    made = squared(pictures)
    side = max(shape)
    assert made.shape == (2, side, side, 3)
    assert (made == 0).sum() == pictures.size
    middle = np.argwhere(made[0, :, :, 0] == 0).mean(0)
    assert np.abs(middle - (side - 1) / 2).max() <= 0.5


def test_gray_and_deep_images():
    view = View((8, 8), 1, (0.5,), (0.25,))
    gray = random(8, 8)
    made = thumbnails(Arrays([gray]), [0], view, side=64)
    np.testing.assert_array_equal(made[0], gray[:, :, None].repeat(3, 2))
    # Of floats the mean is middle gray, and 2.5 standard deviations are black and white.
    deep = torch.tensor([0.5, 0.5 + 2.5 * 0.25, 0.5 - 2.5 * 0.25]).view(3, 1, 1, 1)
    values = as_rgb(deep.expand(3, 1, 8, 8).contiguous(), view)[:, 0, 0, 0]
    np.testing.assert_array_equal(values, [128, 255, 0])
