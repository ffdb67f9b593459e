"""Batches: the same at any number of workers and from any start; bad images."""

import io
import logging
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.common.errors import UserError
from ssl_vit.common.schedules import Length
from ssl_vit.common.seeds import fold, generator
from ssl_vit.common.task import Views
from ssl_vit.data.augment import Crop, DrawTogether, Phase, ViewSpec, resized, take_views
from ssl_vit.data.bad_images import BadImages
from ssl_vit.data.base import Source
from ssl_vit.data.batch import Batch
from ssl_vit.data.decode import BadImage
from ssl_vit.data.eval_images import EvalImages, eval_batches
from ssl_vit.data.levels import Levels
from ssl_vit.data.loader import TrainImages, draw_samples, train_batches
from ssl_vit.data.order import Order, Places
from ssl_vit.data.photometric import WIDTH, Photometric
from ssl_vit.data.sources import open_source
from ssl_vit.data.statistics import MANY, estimate_statistics, survey
from tests.conftest import ROOT

COLOUR = Photometric(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2)
SPEC = ViewSpec((Crop((8, 8)), Crop((4, 6), scale=(0.05, 0.5), count=2, photometric=COLOUR)))


class MadeUp(Source):
    """Random images of random sizes, some of which are unreadable."""

    spec = "made up"
    classes = ("a", "b", "c")

    def __init__(self, n: int, bad: tuple[int, ...] = (), shape: tuple[int, ...] = ()) -> None:
        self.n, self.bad, self.shape = n, set(bad), shape
        self.labels = np.arange(n) % 3

    def __len__(self) -> int:
        return self.n

    def read(self, i: int) -> tuple[np.ndarray, int]:
        if i in self.bad:
            raise BadImage("is garbage")
        random = np.random.default_rng(i)
        shape = self.shape or (*random.integers(6, 20, 2), 3)
        return random.integers(0, 256, shape, dtype=np.uint8), int(self.labels[i])

    def name(self, i: int) -> str:
        return f"image-{i}"


def batches(
    source: Source,
    workers: int = 0,
    start: int = 0,
    stop: int = 6,
    accumulate: int = 1,
    spec: ViewSpec = SPEC,
    rank: int = 0,
    world: int = 1,
) -> list[Batch]:
    images = TrainImages(source, spec, channels=3, seed=1)
    order = Order(len(source), 8, 1, accumulate, rank, world)
    return list(train_batches(images, order, start, stop, workers, pin=False))


def same(a: Batch, b: Batch) -> bool:
    pairs = [*zip(a.views.crops, b.views.crops, strict=True)]
    pairs += zip(a.views.photometric, b.views.photometric, strict=True)
    pairs += zip(a.views.boxes, b.views.boxes, strict=True)
    pairs += [(a.views.drawn[name], b.views.drawn[name]) for name in b.views.drawn]
    pairs += [(a.views.keys, b.views.keys), (a.views.labels, b.views.labels)]
    known = a.bad == b.bad and a.views.key == b.views.key
    return known and all(torch.equal(x, y) for x, y in pairs)


def masks(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a method may draw for a sample: a mask, and an order."""
    return {"mask": rng.random((3, 4)) < 0.6, "order": rng.permutation(12)}


# Every kind of draw there is.
LEVELS = Levels(together=0.8, each=0.5, drop=0.2, noise=0.1)
TURNED = Crop((6, 4), vertical_flip=0.5, photometric=COLOUR, quarter_turns=0.75, levels=LEVELS)
DRAWN = replace(SPEC, crops=(*SPEC.crops, TURNED), draw=masks)


# --- the same batches ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_the_same_at_any_number_of_workers(workers):
    """Crops, keys, labels and what is bad; the epoch ends within these steps."""
    source = MadeUp(30, bad=(3, 17))
    alone, helped = batches(source, spec=DRAWN), batches(source, workers, spec=DRAWN)
    assert len(alone) == len(helped) == 6
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_crops_and_their_parameters_are_in_one_order():
    """View by view: all first crops of a kind, then all second ones; what a worker drew for each.

    A kind without photometric operations has a row of no parameters for each crop.
    """
    source = MadeUp(5)
    views = TrainImages(source, SPEC, channels=3, seed=1).__getitems__([(2, 4), (2, 0)]).views
    assert [tuple(p.shape) for p in views.photometric] == [(2, 0), (4, WIDTH)]
    for i, index in enumerate((4, 0)):
        image = torch.from_numpy(source.read(index)[0]).permute(2, 0, 1)
        taken = take_views(image, SPEC, random.Random(fold(1, 2, index)))
        for view, (crop, drawn, place, _) in enumerate(taken[1]):
            assert torch.equal(views.crops[1][view * 2 + i], crop)
            assert torch.equal(views.photometric[1][view * 2 + i], torch.tensor(drawn))
            assert torch.equal(views.boxes[1][view * 2 + i], torch.tensor(place))
    assert len({tuple(row) for row in views.photometric[1].tolist()}) == 4


# --- what a method draws ------------------------------------------------------------------------


def test_what_is_drawn_is_stacked():
    """Each sample's own, from a generator by its key alone; of the types that were drawn."""
    keys = [fold(5), fold(6), fold(5)]
    found = draw_samples(masks, keys)
    assert {k: (tuple(v.shape), v.dtype) for k, v in found.items()} == {
        "mask": ((3, 3, 4), torch.bool),
        "order": ((3, 12), torch.int64),
    }
    for i, key in enumerate(keys):
        for name, value in masks(generator(fold(key))).items():
            assert np.array_equal(found[name][i].numpy(), value)
    assert torch.equal(found["order"][0], found["order"][2])
    assert not torch.equal(found["order"][0], found["order"][1])


def test_what_is_drawn_arrives_with_its_samples():
    """By ``Views.keys``, as an evaluation draws it; crops and keys are those without it."""
    plain, drawn = (batches(MadeUp(30), spec=spec, stop=2) for spec in (SPEC, DRAWN))
    for without, batch in zip(plain, drawn, strict=True):
        assert without.views.drawn == {}
        assert same(replace(batch, views=batch.views.part(slice(0, 2))), without)
        expected = draw_samples(masks, batch.views.keys.tolist())
        assert list(batch.views.drawn) == list(expected)
        assert all(torch.equal(batch.views.drawn[k], v) for k, v in expected.items())
        assert len(batch.views.drawn["order"].unique(dim=0)) == 8


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_samples_draw_the_same_in_every_world(world):
    """By sample, at any number of processes and of their workers; no two samples alike."""

    def by_key(found: list[Batch]) -> dict[int, tuple]:
        return {
            key: (
                v.drawn["mask"][i].tolist(),
                v.drawn["order"][i].tolist(),
                v.boxes[1][[i, i + len(v.keys)]].tolist(),
                v.boxes[2][i].tolist(),
                v.photometric[2][i].tolist(),
            )
            for v in (batch.views for batch in found)
            for i, key in enumerate(v.keys.tolist())
        }

    source = MadeUp(30)
    alone = by_key(batches(source, spec=DRAWN))
    shared: dict[int, tuple] = {}
    for rank in range(world):
        workers = 3 if rank == 1 else 0
        own = by_key(batches(source, workers, spec=DRAWN, rank=rank, world=world))
        assert len(own) == 48 // world
        shared |= own
    assert len(alone) == 48
    assert shared == alone


def test_boxes_are_in_the_order_of_crops():
    """View by view: the crop of a row is what its box holds of its image."""
    source, spec = MadeUp(9), ViewSpec((Crop((4, 6), (0.3, 0.9), count=3),))
    wanted = [(0, 5), (0, 2), (1, 5)]
    views = TrainImages(source, spec, 3, seed=1).__getitems__(wanted).views
    assert views.boxes[0].shape == (9, 5)
    assert views.boxes[0].dtype == torch.float32
    assert len(views.boxes[0].unique(dim=0)) == 9
    for row, (place, crop) in enumerate(zip(views.boxes[0], views.crops[0], strict=True)):
        image = torch.from_numpy(source.read(wanted[row % 3][1])[0]).permute(2, 0, 1)
        sides = torch.tensor([*image.shape[1:], *image.shape[1:]])
        top, left, height, width = (place[:4] * sides).round().int().tolist()
        found = resized(image[:, top : top + height, left : left + width], (4, 6))
        assert torch.equal(found.flip(-1) if place[4] else found, crop)


def test_batches_do_not_depend_on_where_iteration_starts():
    source = MadeUp(30, bad=(3,))
    whole = batches(source)
    for start in (1, 4):
        rest = batches(source, start=start)
        assert len(rest) == 6 - start
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_accumulated_parts_make_up_the_step():
    source = MadeUp(30)
    whole, parts = batches(source, stop=2), batches(source, stop=2, accumulate=2)
    assert len(parts) == 4
    for i, step in enumerate(whole):
        halves = [p.views for p in parts[2 * i : 2 * i + 2]]
        assert torch.equal(torch.cat([h.keys for h in halves]), step.views.keys)
        assert torch.equal(torch.cat([h.crops[0] for h in halves]), step.views.crops[0])


def test_neither_the_global_generators_nor_other_images_matter():
    """An image's crops follow from (seed, epoch, index) alone, and differ between epochs."""
    images = TrainImages(MadeUp(30), SPEC, 3, seed=1)
    batch = images.__getitems__([(0, 5), (0, 6), (1, 5)])
    torch.manual_seed(123)
    np.random.seed(123)
    alone = images.__getitems__([(0, 6)])
    assert torch.equal(alone.views.crops[0][0], batch.views.crops[0][1])
    assert alone.views.keys[0] == batch.views.keys[1]
    assert len(set(batch.views.keys.tolist())) == 3
    assert not torch.equal(batch.views.crops[0][0], batch.views.crops[0][2])
    other = TrainImages(MadeUp(30), SPEC, 3, seed=2).__getitems__([(0, 6)])
    assert other.views.keys[0] != alone.views.keys[0]


def test_crops_of_a_kind_are_ordered_view_by_view():
    """First the first crops of all images, then the second ones; shapes and types as asked."""
    images = TrainImages(MadeUp(30), SPEC, 3, seed=1)
    batch = images.__getitems__([(0, 5), (0, 6), (0, 7)])
    assert [tuple(c.shape) for c in batch.views.crops] == [(3, 3, 8, 8), (6, 3, 4, 6)]
    assert {c.dtype for c in batch.views.crops} == {torch.uint8}
    assert batch.views.labels.tolist() == [2, 0, 1]
    for i, index in enumerate((5, 6, 7)):
        alone = images.__getitems__([(0, index)]).views.crops[1]
        assert torch.equal(alone, batch.views.crops[1][[i, i + 3]])


# --- bad images ---------------------------------------------------------------------------------


def test_a_bad_image_is_replaced_by_always_the_same_one():
    """By another image of the source with its own label, reported under its own name."""
    good, source = MadeUp(30), MadeUp(30, bad=(3,))
    images = TrainImages(source, SPEC, 3, seed=1)
    first, again = images.__getitems__([(0, 3)]), images.__getitems__([(0, 3)])
    assert first.bad == {3: "image-3: is garbage"}
    assert same(first, again)
    replaced, label = images._readable(3, 5, SPEC, {}, set())
    others = [
        TrainImages(good, SPEC, 3, seed=1)._readable(i, 5, SPEC, {}, set()) for i in range(30)
    ]
    matches = [
        i for i, other in enumerate(others) if torch.equal(other[0][0][0][0], replaced[0][0][0])
    ]
    assert len(matches) == 1
    assert matches[0] != 3
    assert others[matches[0]][1] == label
    assert images.__getitems__([(0, 4)]).bad == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_bad_images_is_one_clear_line(workers):
    """From a worker, too: no traceback in the message."""
    with pytest.raises(UserError) as caught:
        batches(MadeUp(30, bad=tuple(range(30))), workers)
    text = str(caught.value)
    assert "10 images in a row cannot be read" in text
    assert "is garbage" in text
    assert "\n" not in text
    assert "Traceback" not in text


def count(counter: BadImages, bad: dict[int, str]) -> None:
    """What a step does with a batch's unreadable images."""
    none = torch.zeros(0, dtype=torch.int64)
    counter.note(Batch(Views([], none, none), bad))
    counter.count()


def test_bad_images_are_counted_and_named_once(caplog):
    counter = BadImages(MadeUp(100), max_share=0.02)
    with caplog.at_level(logging.WARNING, logger="ssl_vit"):
        count(counter, {3: "image-3: is garbage"})
        count(counter, {})
        count(counter, {3: "image-3: is garbage", 5: "image-5: is garbage"})
    assert counter.found == {3, 5}
    assert [r.getMessage().count("image-3") for r in caplog.records] == [1, 0]
    assert "image-5" in caplog.text


def test_too_many_bad_images_stop_the_run():
    """More than the share: exactly the share is still let through."""
    counter = BadImages(MadeUp(100), max_share=0.02)
    count(counter, {1: "one", 2: "two"})
    with pytest.raises(UserError, match=r"3 of 100 images of made up.*--data.max-bad 0.02.*three"):
        count(counter, {3: "three"})
    with pytest.raises(UserError):
        count(BadImages(MadeUp(100), max_share=0.0), {1: "one"})


def test_an_error_does_not_wait_for_workers():
    """They ignore SIGTERM; a process that fails while they work must end all the same."""
    script = """if True:
        from ssl_vit.data.augment import Crop, ViewSpec
        from ssl_vit.data.loader import TrainImages, train_batches
        from ssl_vit.data.order import Order, Places
        from ssl_vit.data.sources import open_source
        source = open_source("digits:train")
        images = TrainImages(source, ViewSpec((Crop((8, 8)),)), 1, 0)
        batches = train_batches(images, Order(len(source), 8, 0), 0, 100, 2, False)
        next(batches)
        raise RuntimeError("out of memory")
    """
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "RuntimeError: out of memory"


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_readable_image_once_in_order(workers):
    source = MadeUp(23, bad=(0, 1, 2, 3, 4, 9))
    images = EvalImages(source, (8, 8), 1.0, 3)
    found = list(eval_batches(images, 5, workers, pin=False))
    assert len(found) == 5
    assert found[0].views.crops == []
    keys = torch.cat([b.views.keys for b in found]).tolist()
    assert keys == [5, 6, 7, 8, *range(10, 23)]
    labels = torch.cat([b.views.labels for b in found]).tolist()
    assert labels == [key % 3 for key in keys]
    assert sorted(i for b in found for i in b.bad) == [0, 1, 2, 3, 4, 9]
    assert {tuple(b.views.crops[0].shape[1:]) for b in found[1:]} == {(3, 8, 8)}


# --- folders of uncommon images -----------------------------------------------------------------


def folder_batch(root, channels: int) -> tuple[Batch, Source]:
    source = open_source(f"folder:{root}")
    images = TrainImages(source, ViewSpec((Crop((8, 8)),)), channels, seed=0)
    return images.__getitems__([(0, i) for i in range(len(source))]), source


def write(root, name: str, array: np.ndarray) -> None:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def test_a_folder_of_gray_images(tmp_path):
    """One channel stays one, or is repeated to three."""
    for i in range(4):
        gray = np.random.default_rng(i).integers(0, 256, (12, 10), dtype=np.uint8)
        write(tmp_path, f"{'ab'[i % 2]}/{i}.png", gray)
    one, _ = folder_batch(tmp_path, 1)
    three, _ = folder_batch(tmp_path, 3)
    assert one.views.crops[0].shape == (4, 1, 8, 8)
    assert one.views.crops[0].dtype == torch.uint8
    assert one.views.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(three.views.crops[0], one.views.crops[0].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_folder_of_five_channel_arrays(tmp_path, dtype):
    """NPY files with the channels last or first; other counts are named as bad."""
    arrays = np.random.default_rng(0).integers(0, 256, (3, 12, 10, 5)).astype(dtype)
    write(tmp_path, "0.npy", arrays[0])
    write(tmp_path, "1.npy", arrays[1].transpose(2, 0, 1))
    write(tmp_path, "2.npy", arrays[2][..., :4])
    batch, source = folder_batch(tmp_path, 5)
    assert batch.views.crops[0].shape == (3, 5, 8, 8)
    assert batch.views.crops[0].dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert batch.views.labels.tolist() == [-1, -1, -1]
    assert list(batch.bad) == [2]
    assert "4 channels, --data.channels is 5" in batch.bad[2]
    mean, _, _ = estimate_statistics(survey(source, 5, 0, MANY))
    scale = 255 if dtype == np.uint8 else 1
    assert mean == pytest.approx(arrays[:2].mean((0, 1, 2)) / scale, rel=1e-4)


def test_a_folder_of_16_bit_images(tmp_path):
    """They keep their depth, as floats in 0..1; a broken file among them is named and replaced."""
    deep = np.random.default_rng(0).integers(0, 65536, (3, 12, 10), dtype=np.uint16)
    for i in range(3):
        write(tmp_path, f"{i}.png", deep[i])
    buffer = io.BytesIO()
    Image.fromarray(deep[0]).save(buffer, "PNG")
    (tmp_path / "3.png").write_bytes(buffer.getvalue()[:100])
    batch, source = folder_batch(tmp_path, 1)
    crops = batch.views.crops[0]
    assert crops.dtype == torch.float32
    assert crops.shape == (4, 1, 8, 8)
    assert list(batch.bad) == [3]
    assert "3.png" in batch.bad[3]
    images = EvalImages(source, (12, 10), 1.0, 1).__getitems__([0, 1, 2]).views.crops[0]
    np.testing.assert_allclose(images[:, 0].numpy(), deep / 65535, rtol=1e-6)
    levels = [len(set(row)) for row in (images[:, 0] * 65535).round().int().flatten(1).tolist()]
    assert min(levels) > 115


def test_eight_bit_and_deeper_images_share_a_batch(tmp_path):
    """The same picture stored with 8 and with 16 bits gives the same numbers, side by side."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture.astype(np.uint16) * 257).save(tmp_path / "b.png")
    images = EvalImages(open_source(f"flat:{tmp_path}"), (8, 8), 1.0, 1)
    batch = images.__getitems__([0, 1]).views.crops[0]
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch[0], batch[1])
    alone = images.__getitems__([0]).views.crops[0]
    assert alone.dtype == torch.uint8


def test_pinning_reaches_every_tensor(monkeypatch):
    """What the loader calls on its batches; pinning itself needs a GPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    crops, drawn = [torch.zeros(1), torch.ones(1)], [torch.full((1,), 2.0), torch.zeros(1, 0)]
    views = Views(crops, torch.tensor([1]), torch.tensor([2]), drawn)
    assert Batch(views, {3: "bad"}).pin_memory().bad == {3: "bad"}
    assert len(pinned) == 6
    moved = views.to(torch.device("cpu"))
    assert moved.photometric[0] is drawn[0]


def stepwise(places: Places) -> dict[str, np.ndarray]:
    """Of each image its place in the step, and the step's key."""
    own = np.arange(places.start, places.start + places.count)
    return {"place": own, "key": np.full(places.count, places.key), "batch": np.array(places.batch)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (2, 2)])
def test_what_is_drawn_together_knows_the_place_in_the_step(world, accumulate, workers):
    """At any number of processes, parts and workers, the same for the same image."""
    spec = replace(SPEC, draw_together=stepwise)
    found = {}
    for rank in range(world):
        images = TrainImages(MadeUp(30), spec, 3, seed=1)
        order = Order(30, 8, 1, accumulate, rank, world)
        batches = train_batches(images, order, 2, 4, workers, pin=False)
        for i, batch in enumerate(batches):
            step, drawn = 2 + i // accumulate, batch.views.drawn
            assert drawn["batch"].item() == 8
            assert set(drawn["key"].tolist()) == {fold(1, step)}
            for place, key in zip(drawn["place"].tolist(), batch.views.keys.tolist(), strict=True):
                found[step, place] = key
    alone = Order(30, 8, 1)
    for step in (2, 3):
        epoch, indices = alone.part(step, 0)
        keys = [fold(fold(1, epoch, int(i))) for i in indices]
        assert [found[step, place] for place in range(8)] == keys


def drawn_in_first(places: Places) -> dict[str, np.ndarray]:
    return {"phase": np.array(1)}


def drawn_in_second(places: Places) -> dict[str, np.ndarray]:
    return {"phase": np.array(2)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_phases_follow_the_step(start, workers):
    """Each has its own crops and draws, wherever iteration starts; a batch belongs to one."""

    def sized(size: int, drawn: DrawTogether) -> ViewSpec:
        crops = tuple(replace(crop, size=(size, size)) for crop in SPEC.crops)
        return replace(SPEC, crops=crops, draw_together=drawn)

    phases = (
        Phase(Length(2.0, "st"), (4, 4), sized(4, drawn_in_first)),
        Phase(Length(4 / 3, "ep"), (6, 6), sized(6, drawn_in_second)),
    )
    spec = replace(sized(8, stepwise), phases=phases)
    found = batches(MadeUp(24), workers, start=start, stop=6, spec=spec)  # 3 steps an epoch
    assert [b.views.crops[0].shape[-1] for b in found] == [4, 4, 6, 6, 8, 8][start:]
    drawn = [b.views.drawn.get("phase", torch.tensor(0)).item() for b in found]
    assert drawn == [1, 1, 2, 2, 0, 0][start:]
    aside = TrainImages(MadeUp(24), spec, 3, seed=1).__getitems__([(0, 5)]).views
    assert aside.crops[0].shape[-1] == 8


def test_images_of_no_step_are_one_of_their_own():
    spec = replace(SPEC, draw_together=stepwise)
    drawn = TrainImages(MadeUp(30), spec, 3, seed=1).__getitems__([(0, 5), (0, 6)]).views.drawn
    assert drawn["place"].tolist() == [0, 1]
    assert drawn["batch"].item() == 2
