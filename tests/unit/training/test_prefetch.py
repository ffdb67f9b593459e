"""Batches on their way to the device: order, how many are taken, what is raised.

``tests/gpu/test_prefetch_gpu.py`` runs the same on CUDA.
"""

from collections.abc import Iterator

import pytest
import torch

from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data.batch import Batch
from ssl_vit.data.pairs import PairBatch
from ssl_vit.training.prefetch import on_device


def batch(i: int) -> Batch:
    """Of the shapes that workers send; every number in it is ``i``."""
    crops = [torch.full((8, 3, 64, 64), i, dtype=torch.uint8), torch.full((16, 3, 32, 32), 1.0 * i)]
    numbers = torch.full((8,), i)
    drawn, boxes = {"order": torch.full((8, 4), i)}, [torch.full((8, 5), 2.0 * i)]
    missing = [torch.full_like(crop, i % 2, dtype=torch.bool) for crop in crops]
    colours = [torch.full((8, 10), 0.5 * i)]
    views = Views(crops, numbers, numbers + 1, colours, i, drawn, boxes, missing)
    return Batch(views.pin_memory() if torch.cuda.is_available() else views, {i: "bad"})


def numbers(found: Batch) -> tuple[float, ...]:
    views = found.views
    assert all((t == t.flatten()[0]).all() for t in views.tensors())
    return *(t.flatten()[0].item() for t in views.tensors()), views.key, *found.bad


@pytest.mark.parametrize("n", [0, 1, 2, 30])
def test_batches_arrive_whole_and_in_order(n):
    whole_and_in_order("cpu", n)


def whole_and_in_order(device: str, n: int) -> None:
    """Each is read late, after more were sent and much was computed meanwhile."""
    x = torch.ones(2000, 2000, device=device) if device == "cuda" else torch.ones(2, 2)
    found, held = [], []
    for arrived in on_device((batch(i) for i in range(n)), torch.device(device)):
        assert {t.device.type for t in (arrived.views.keys, *arrived.views.crops)} == {device}
        x = x @ x / x.shape[0]
        held.append(arrived)
        if len(held) == 3:
            found.append(numbers(held.pop(0)))
    found += [numbers(one) for one in held]
    assert found == [(i, i, i, i + 1, 0.5 * i, i, 2 * i, i % 2, i % 2, i, i) for i in range(n)]


def test_no_more_is_taken_than_asked_for():
    no_more_is_taken("cpu", ahead=0)


def no_more_is_taken(device: str, ahead: int) -> None:
    """Than so many batches ahead of those asked for."""
    taken: list[int] = []

    def batches() -> Iterator[Batch]:
        for i in range(9):
            taken.append(i)
            yield batch(i)

    for i, _ in enumerate(on_device(batches(), torch.device(device))):
        assert len(taken) == min(9, i + 1 + ahead)


def test_errors_come_through():
    errors_come_through("cpu")


def errors_come_through(device: str) -> None:
    """Those of the loader."""

    def batches() -> Iterator[Batch]:
        yield batch(0)
        yield batch(1)
        raise UserError("10 images in a row cannot be read")

    arriving = on_device(batches(), torch.device(device))
    assert numbers(next(arriving))[0] == 0
    with pytest.raises(UserError, match="in a row"):
        list(arriving)


def test_a_batch_of_another_kind_stays_so():
    """Masks, which stay where they are, too."""
    masks = [torch.ones(3, 4)]
    views = batch(5).views
    (found,) = on_device(iter([PairBatch(views, {1: "bad"}, masks)]), torch.device("cpu"))
    assert isinstance(found, PairBatch)
    assert found.masks is masks
    assert found.bad == {1: "bad"}
