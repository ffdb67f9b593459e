"""Batches that come out of a worker as they went in."""

import multiprocessing
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from ssl_vit.common.task import Views
from ssl_vit.data.batch import Batch
from ssl_vit.data.packing import _SMALL, Packed, packed

LARGE = _SMALL // 3 + 5


def batch() -> Batch:
    """Every kind of tensor that a batch can have; the second kind of crop is large."""
    torch.manual_seed(0)
    by_pixel = torch.randint(0, 256, (4, 5, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    views = Views(
        crops=[by_pixel, torch.rand(1, 3, 1, LARGE)],
        keys=torch.randint(0, 2**62, (4,)),
        labels=torch.tensor([1, -1, 0, 2]),
        photometric=[torch.rand(4, 9), torch.empty(1, 0)],
        key=5,
        drawn={"mask": torch.rand(4, 6) > 0.5, "half": torch.rand(3).bfloat16()},
        boxes=[torch.rand(8, 5)[::2], torch.rand(5, 1).mT],
    )
    return Batch(views, {3: "a.png: no image"}, empty={1})


def tensors_of(views: Views) -> list[torch.Tensor]:
    return [
        *views.crops,
        views.keys,
        views.labels,
        *views.photometric,
        *views.drawn.values(),
        *views.boxes,
    ]


def checked(found: Batch, given: Batch) -> None:
    assert (found.bad, found.empty, found.views.key) == (given.bad, given.empty, given.views.key)
    assert found.views.drawn.keys() == given.views.drawn.keys()
    for a, b in zip(tensors_of(found.views), tensors_of(given.views), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)
    assert found.views.crops[0].stride() == given.views.crops[0].stride()
    assert found.nbytes == given.nbytes


def test_it_is_as_it_was():
    given = batch()
    checked(packed(lambda same: same, given).open(), given)


def test_tensors_do_not_overlap():
    """What is written to one is in no other."""
    given = batch()
    for i, expected in enumerate(tensors_of(given.views)):
        found = tensors_of(packed(lambda same: same, given).open().views)
        found[i].zero_()
        assert not found[i].any() or not expected.numel()
        for j, (a, b) in enumerate(zip(found, tensors_of(given.views), strict=True)):
            assert j == i or torch.equal(a, b)


def test_small_tensors_take_one_file(monkeypatch):
    """And large ones one each: a file costs more than to copy what is small."""
    files = []

    def send(storage: torch.UntypedStorage) -> tuple:
        files.append(storage.nbytes())
        return int, ()

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.UntypedStorage, send)
    packed(lambda same: same, batch())
    views = batch().views
    gaps = 8 * 5 * 4  # of every second row of boxes the whole memory goes
    small = sum(-(-t.nbytes // 64) * 64 for t in tensors_of(views) if t is not views.crops[1])
    small -= -(-views.boxes[0].nbytes // 64) * 64
    assert sorted(files) == sorted([small, 12 * LARGE, gaps])


def test_what_is_kept_of_a_batch_keeps_no_batch():
    """As labels and keys of a whole data set are."""
    found = packed(lambda same: same, batch()).open()
    for small in (found.views.keys, found.views.labels):
        assert small.untyped_storage().nbytes() == small.nbytes
    crops = packed(lambda same: same, torch.zeros(_SMALL // 2, dtype=torch.uint8)).open()
    assert crops.is_shared()


@pytest.mark.parametrize("value", [[], {}, (1, "a"), None])
def test_what_has_no_tensors_goes_too(value):
    assert packed(lambda same: same, value).open() == value


def send(pipe) -> None:
    pipe.send(packed(lambda same: same, batch()))
    pipe.recv()  # until it is opened


def test_it_comes_out_of_another_process():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=send, args=(theirs,))
    worker.start()
    sent = ours.recv()
    assert isinstance(sent, Packed)
    found = sent.open()
    ours.send(None)
    worker.join(30)
    checked(found, batch())
