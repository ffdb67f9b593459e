"""Training any method on images of which pixels are missing: it goes on, on what is there."""

import dataclasses

import numpy as np
import torch

from ssl_vit.data.base import Item, Source
from tests.contract import tiny


class Holed(Source):
    """Images as floats in 0..1, of which some have missing pixels; the last one has no others."""

    def __init__(self, source: Source, holes: bool) -> None:
        self.source, self.holes = source, holes
        self.spec, self.reading = source.spec, source.reading

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> Item:
        image = np.asarray(self.source.read(i)[0], np.float32) / 255
        if self.holes and i % 3:
            image[: image.shape[0] // 3] = np.nan
            image[:, i % image.shape[1]] = np.nan
        return image if i < len(self) - 1 else image * np.nan, None

    def name(self, i: int) -> str:
        return self.source.name(i)


def session(name: str, holes: bool) -> tiny.Pretraining:
    made = tiny.session(name)
    images = dataclasses.replace(made.images, train=Holed(made.images.train, holes))
    made.images = images
    return made


def test_it_learns_where_pixels_are_missing(name):
    made = session(name, holes=True)
    assert any(batch.views.missing for batch in tiny.batches(made))
    first, said = tiny.state(made.task), tiny.train(made)
    assert all(np.isfinite(list(scalars.values())).all() for scalars in said)
    assert all(scalars["skipped"] == 0 and scalars["grad_norm"] > 0 for scalars in said)
    after = tiny.state(made.task)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, first[key]) for key, value in after.items())


def test_panels_of_such_images_are_pictures(name):
    made = session(name, holes=True)
    views = tiny.first_views(made)
    assert all(crop.isfinite().all() for crop in views.crops)
    for picture in made.task.eval().panels(views, made.trainer.normalize).values():
        assert picture.dtype == np.uint8


def test_without_missing_pixels_nothing_of_it_is_there(name):
    made = session(name, holes=False)
    assert all(batch.views.missing == [] for batch in tiny.batches(made))


def test_a_batch_that_holds_nothing_is_finite(name):
    """As one process of many may be given."""
    made = session(name, holes=True)
    views = tiny.first_views(made)
    crops = [torch.zeros_like(crop) for crop in views.crops]
    missing = [torch.ones_like(crop, dtype=torch.bool) for crop in crops]
    scalars = made.task.train()(dataclasses.replace(views, crops=crops, missing=missing), 0)
    assert all(value.isfinite() for value in scalars.values())
    scalars["loss"].backward()
    trained = [p for p in made.task.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
