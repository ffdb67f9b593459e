"""Batches of views: moved whole, parts of them, and second draws from the same samples."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.common.seeds import fold, uniform
from ssl_vit.common.task import Views


def made(b: int = 3) -> Views:
    keys = torch.tensor([fold(7, i) for i in range(b)])
    return Views(
        crops=[torch.rand(b, 1, 2, 2), torch.rand(2 * b, 1, 1, 1)],
        keys=keys,
        labels=torch.arange(b),
        photometric=[torch.rand(b, 0), torch.rand(2 * b, 10)],
        key=fold(*keys.tolist()),
        drawn={"mask": torch.rand(b, 4), "a.mask": torch.rand(b, 5), "b.order": torch.rand(b, 6)},
        boxes=[torch.rand(b, 5), torch.rand(2 * b, 5)],
        missing=[torch.rand(b, 1, 2, 2) < 0.5, torch.rand(2 * b, 1, 1, 1) < 0.5],
    )


def tensors(views: Views) -> list[torch.Tensor]:
    found = [*views.crops, views.keys, views.labels, *views.photometric]
    return [*found, *views.drawn.values(), *views.boxes, *views.missing]


@pytest.mark.parametrize("how", ["to", "pin_memory"])
def test_everything_is_moved(how, monkeypatch):
    """Each tensor, what was drawn and boxes among them, by its name and in its place."""
    views, moved = made(), []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    other = views.to(torch.device("meta")) if how == "to" else views.pin_memory()
    assert (other.key, list(other.drawn)) == (views.key, list(views.drawn))
    assert len(tensors(other)) == len(tensors(views)) == 13
    for a, b in zip(tensors(views), tensors(other), strict=True):
        if how == "to":
            assert b.device.type == "meta"
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        else:
            assert a.data_ptr() != b.data_ptr() or not a.numel()
            assert torch.equal(a, b)
    assert how == "to" or len(moved) == 13


def test_what_the_host_uses_is_not_copied_to_cuda():
    """Tensors are fake; those of the others are all copied."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copies.extend([args[0].shape] * (function is torch.ops.aten._to_copy.default))
            return function(*args, **(kwargs or {}))

    real = made()
    with FakeTensorMode() as fake:
        views = real._each(fake.from_tensor)
        with Copies():
            other = views.to(torch.device("cuda", 0))
    assert len(copies) == 11
    assert other.photometric is views.photometric
    there = {t.device.type for t in tensors(dataclasses.replace(other, photometric=[]))}
    assert there == {"cuda"}


def test_bytes_are_those_of_each_tensor():
    views = made()
    assert views.nbytes == sum(t.numel() * t.element_size() for t in tensors(views))


def test_a_second_draw_is_independent_and_a_function_of_the_first():
    """Other keys for each i, the same again; crops, labels and what was drawn stay."""
    views = made(200)
    draws = [views.redrawn(i) for i in range(3)]
    for i, other in enumerate(draws):
        again = views.redrawn(i)
        assert torch.equal(other.keys, again.keys)
        assert other.keys.tolist() == [fold(k, i) for k in views.keys.tolist()]
        assert other.key == again.key == fold(views.key, i)
        assert all(a is b for a, b in zip(other.crops, views.crops, strict=True))
        assert (other.drawn, other.labels) == (views.drawn, views.labels)
    numbers = [uniform(v.keys, 20).double() for v in (views, *draws)]
    correlation = torch.corrcoef(torch.stack([n.flatten() for n in numbers]))
    off = correlation - torch.eye(4)
    assert off.abs().max() < 4 / (200 * 20) ** 0.5
    assert len({v.key for v in (views, *draws)}) == 4
    assert len(torch.cat([v.keys for v in (views, *draws)]).unique()) == 800


def test_a_part_is_of_some_kinds_and_one_name():
    views = made()
    part = views.part(slice(1, 2), "a")
    for name in ("crops", "photometric", "boxes", "missing"):
        (found,) = getattr(part, name)
        assert found is getattr(views, name)[1]
    assert list(part.drawn) == ["mask"]
    assert part.drawn["mask"] is views.drawn["a.mask"]
    assert part.keys is views.keys
    assert part.labels is views.labels
    assert part.key == views.key
    assert views.part(slice(0, 2), "none").drawn == {}


def test_a_part_without_a_name_keeps_what_was_drawn():
    views = made()
    part = views.part(slice(0, 1))
    assert part.drawn == views.drawn
    assert len(part.crops) == 1
    evaluated = Views(views.crops, views.keys, views.labels).part(slice(0, 1))
    assert (evaluated.photometric, evaluated.boxes, evaluated.drawn) == ([], [], {})
    assert evaluated.missing == []
    assert evaluated.missing_of(0) is None


def test_all_tensors_are_named_once():
    """What a second stream of a GPU must keep until it is used: each field's."""
    views = made()
    assert [id(t) for t in views.tensors()] == [id(t) for t in tensors(views)]
    assert views.missing_of(1) is views.missing[1]
