"""Mixed sources: how they are written, how often each is drawn, and what they have in common."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Source, Subset, epoch_length, known_labels, split_holdout, units
from ssl_vit.data.draws import Draws, Mix
from ssl_vit.data.fingerprint import fingerprint
from ssl_vit.data.images import open_images
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.mixed import Mixed, parts_of
from ssl_vit.data.order import Order
from ssl_vit.data.sources import _OPENERS, open_source
from ssl_vit.data.statistics import survey
from tests.unit.commands.test_preflight import session_of
from tests.unit.data.test_slices import bytes_of, named


def images(folder: Path, count: int, value: int = 0, names: str = "{:02d}.png") -> Path:
    """Gray images of one value and one more at a corner, each another."""
    for i in range(count):
        path = folder / names.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8), value, dtype=np.uint8)
        pixels[0, 0] = i
        Image.fromarray(pixels).save(path)
    return folder


# --- how they are written -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("folder:/a", [("folder:/a", 1)]),
        ("folder:/a*2,flat:/b", [("folder:/a", 2), ("flat:/b", 1)]),
        ("folder:/a*.5, flat:/b*1.25", [("folder:/a", 0.5), ("flat:/b", 1.25)]),
        ("folder:/a * 2 , flat:/b *3", [("folder:/a", 2), ("flat:/b", 3)]),
        ("folder:/a,b", [("folder:/a,b", 1)]),
        ("folder:/a,flatter:/b", [("folder:/a,flatter:/b", 1)]),
        ("tar:/x-{1,2}.tar,folder:/a", [("tar:/x-{1,2}.tar", 1), ("folder:/a", 1)]),
        ("tar:/x-*.tar", [("tar:/x-*.tar", 1)]),
        ("tar:/x-*.tar*3", [("tar:/x-*.tar", 3)]),
        ("tar:/x-*", [("tar:/x-*", 1)]),
        ("digits:train*2,digits:val", [("digits:train", 2), ("digits:val", 1)]),
        ("flat:/a,digits", [("flat:/a", 1), ("digits", 1)]),
        ("flat:/a,digitsandmore", [("flat:/a,digitsandmore", 1)]),
        ("kept:folder:/a*2,held:flat:/b", [("kept:folder:/a", 2), ("held:flat:/b", 1)]),
        (
            "hf:x/y#c:train*2,torchvision:CIFAR10:/r:test",
            [("hf:x/y#c:train", 2), ("torchvision:CIFAR10:/r:test", 1)],
        ),
    ],
)
def test_how_sources_are_joined(spec, expected):
    assert parts_of(spec, _OPENERS) == expected


def test_what_is_on_the_disk_by_the_whole_name_is_one_source(tmp_path):
    for name in ("a*2", "b,flat:c", "x-1.tar2", "plain"):
        (tmp_path / name).mkdir(parents=True)
    assert parts_of(f"folder:{tmp_path}/a*2", _OPENERS) == [(f"folder:{tmp_path}/a*2", 1)]
    assert parts_of(f"kept:folder:{tmp_path}/a*2*3", _OPENERS) == [
        (f"kept:folder:{tmp_path}/a*2", 3)
    ]
    assert parts_of(f"flat:{tmp_path}/b,flat:c", _OPENERS) == [(f"flat:{tmp_path}/b,flat:c", 1)]
    assert parts_of(f"flat:{tmp_path}/plain*2", _OPENERS) == [(f"flat:{tmp_path}/plain", 2)]
    (tmp_path / "shard-12").write_bytes(b"")
    pattern = f"tar:{tmp_path}/shard-*2"  # finds a shard
    assert parts_of(pattern, _OPENERS) == [(pattern, 1)]
    assert parts_of(f"{pattern}*2", _OPENERS) == [(pattern, 2)]
    os.remove(tmp_path / "shard-12")
    assert parts_of(pattern, _OPENERS) == [(f"tar:{tmp_path}/shard-", 2)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flat:/a*0,flat:/b", "'flat:/a*0' has the weight 0; it must be above 0"),
        ("flat:/a*2,flat:/a", "names ['flat:/a'] twice; give it once, with a weight"),
    ],
)
def test_mistakes_are_told(spec, message):
    with pytest.raises(UserError) as error:
        parts_of(spec, _OPENERS)
    assert message in str(error.value)


def test_weights_are_for_training(tmp_path):
    one, two = images(tmp_path / "a", 3), images(tmp_path / "b", 2)
    assert len(open_source(f"flat:{one},flat:{two}")) == 5
    with pytest.raises(UserError, match="has weights, by which training images are drawn"):
        open_source(f"flat:{one}*2,flat:{two}")


# --- draws --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_all_images_of_a_source_are_drawn_equally_often(sizes, weights, seed):
    of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    mix = Mix(tuple("abc"[: len(sizes)]), tuple(weights[: len(sizes)]), of)
    draws = Draws(mix, seed)
    assert len(draws) == sum(mix.draws)
    total: Counter[int] = Counter()
    for epoch in range(5):
        drawn = draws.at(epoch, np.arange(len(draws)))
        for i, (size, weight) in enumerate(zip(sizes, mix.weights, strict=True)):
            own = drawn[of[drawn] == i]
            assert len(own) == mix.draws[i] == max(1, round(weight * size))
            if weight == int(weight):  # exactly so often in every epoch
                assert set(Counter(own.tolist()).values()) == {int(weight)}
        total.update(drawn.tolist())
        for i in range(len(sizes)):
            counts = [total[j] for j in np.flatnonzero(of == i).tolist()]
            assert max(counts) - min(counts) <= 1


def test_the_halves_of_a_weight_of_a_half_follow_each_other_and_change():
    draws = Draws(Mix(("a",), (0.5,), np.zeros(20, dtype=np.int32)), seed=1)
    halves = [set(draws.at(epoch, np.arange(10)).tolist()) for epoch in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(20))
    assert halves[0] != halves[2]
    some = draws.at(3, np.array([7, 2]))
    np.testing.assert_array_equal(some, draws.at(3, np.arange(10))[[7, 2]])
    other = Draws(Mix(("a",), (0.5,), np.zeros(20, dtype=np.int32)), seed=2)
    assert not np.array_equal(draws.at(0, np.arange(10)), other.at(0, np.arange(10)))


class Valued(Source):
    """Images (8, 8) of one value each."""

    def __init__(self, spec: str, values: list[int]) -> None:
        self.spec, self.values = spec, values

    def __len__(self) -> int:
        return len(self.values)

    def read(self, i: int) -> tuple[np.ndarray, None]:
        return np.full((8, 8), self.values[i], dtype=np.uint8), None

    def name(self, i: int) -> str:
        return f"{self.spec}/{i}"


def mixed(*weights: float) -> Mixed:
    parts = [Valued("a", list(range(12))), Valued("b", list(range(100, 130)))]
    return Mixed("a,b", parts, ["a", "b"], [float(w) for w in weights], ReadConfig())


def seen(
    source: Source, start: int, stop: int, world: int = 1, workers: int = 0
) -> list[list[int]]:
    """Values of the images of each step, over all processes in order."""
    spec = ViewSpec((Crop((8, 8), scale=(0.9, 1.0)),))
    found: list[list[int]] = [[] for _ in range(start, stop)]
    for rank in range(world):
        order = Order(epoch_length(source), 6, 3, rank=rank, world=world)
        made = TrainImages(source, spec, 1, seed=3)
        batches = train_batches(made, order, start, stop, workers, False)
        for values, batch in zip(found, batches, strict=True):
            values += [int(crop.max()) for crop in batch.views.crops[0]]
    return found


def test_batches_are_mixed_by_weight_and_a_function_of_the_step():
    source = mixed(2, 1)
    assert epoch_length(source) == 54
    steps = seen(source, 0, 18)  # two epochs of nine steps
    for epoch in (steps[:9], steps[9:]):
        counts = Counter(value for step in epoch for value in step)
        assert [counts[i] for i in range(12)] == [2] * 12
        assert [counts[i] for i in range(100, 130)] == [1] * 30
    assert steps[:9] != steps[9:]
    assert seen(source, 11, 18) == steps[11:]
    assert seen(source, 0, 18, world=3) == steps
    assert seen(source, 4, 8, workers=2) == steps[4:8]
    assert any({v < 100 for v in step} == {True, False} for step in steps)


def test_an_image_that_is_drawn_twice_is_cropped_in_two_ways():
    source = Mixed("a", [Valued("a", [7])], ["a"], [4.0], ReadConfig())
    batch = TrainImages(source, ViewSpec((Crop((4, 4), scale=(0.1, 1.0)),)), 1, 0).__getitems__(
        [(0, i) for i in range(4)]
    )
    assert len(batch.views.keys.unique()) == 4
    assert len({tuple(box) for box in batch.views.boxes[0].tolist()}) == 4


def test_without_weights_an_epoch_is_the_shuffled_whole():
    source = mixed(1, 1)
    values = [v for step in seen(source, 0, 7) for v in step]
    assert sorted(values) == [*range(12), *range(100, 130)]
    assert TrainImages(source, ViewSpec((Crop((8, 8)),)), 1, 0).draws is None


def test_held_out_images_are_not_drawn():
    train, held = split_holdout(mixed(3, 1), 4, seed=0)
    assert epoch_length(train) == 3 * (train.mix.of == 0).sum() + (train.mix.of == 1).sum()
    values = {v for step in seen(train, 0, epoch_length(train) // 6) for v in step}
    assert not values & {int(held.read(i)[0].max()) for i in range(4)}


# --- what they have in common -------------------------------------------------------------------


def labelled(spec: str, classes: tuple[str, ...] | None, labels: list[int] | None) -> Valued:
    made = Valued(spec, list(range(len(labels) if labels else 3)))
    made.classes, made.labels_from = classes, f"of {spec}"
    made.labels = None if labels is None else np.array(labels)
    return made


def joined(*parts: Source) -> Mixed:
    return Mixed("m", parts, [p.spec for p in parts], [1.0] * len(parts), ReadConfig())


def test_classes_of_one_name_are_one_class():
    made = joined(labelled("x", ("cat", "dog"), [0, 1, -1]), labelled("y", ("ant", "cat"), [0, 1]))
    assert made.classes == ("cat", "dog", "ant")
    assert made.labels.tolist() == [0, 1, -1, 2, 0]
    assert made.read(4)[1] == 0
    assert made.labels_from == "of x; of y"


def test_images_of_a_source_without_labels_have_none():
    made = joined(labelled("x", ("cat", "dog"), [0, 1]), labelled("y", None, None))
    assert known_labels(made).tolist() == [True, True, False, False, False]
    assert made.labels_from == "of x"
    bare = joined(labelled("x", None, None), labelled("y", None, None))
    assert bare.labels is None
    assert bare.labels_from == "of x; of y"


def test_several_labels_are_joined_by_name():
    one, two = labelled("x", ("a", "b"), None), labelled("y", ("b",), None)
    one.targets = np.array([[1, 0], [0, 1], [np.nan, 1]], dtype=np.float32)
    two.targets = np.array([[1], [0], [1]], dtype=np.float32)
    made = joined(one, two)
    assert made.classes == ("a", "b")
    np.testing.assert_array_equal(made.targets[3:], [[np.nan, 1], [np.nan, 0], [np.nan, 1]])
    np.testing.assert_array_equal(made.targets[:3], one.targets)
    other = joined(one, labelled("z", ("b", "c"), [0, 1]))
    assert (other.labels, other.targets) == (None, None)
    assert other.labels_from == "some sources have one class an image, others several labels"


def test_a_csv_may_be_of_one_source_only(tmp_path, caplog):
    one, two = images(tmp_path / "a", 3), images(tmp_path / "b", 2, names="w{:02d}.png")
    (tmp_path / "t.csv").write_text("image,patient,y\n00,p,u\n01,p,v\n02,q,u\n")
    reading = ReadConfig(labels=str(tmp_path / "t.csv"), group="patient")
    made = open_source(f"flat:{one},flat:{two}", reading)
    assert made.labels.tolist() == [0, 1, 0, -1, -1]
    assert len(np.unique(made.groups)) == 4
    assert made.groups[0] == made.groups[1]
    assert made.reading == reading
    assert "has no line for any of 2 images" in caplog.text
    with pytest.raises(UserError, match="has no line for any of 2 images"):
        open_source(f"flat:{two},flat:{images(tmp_path / 'c', 1, names='z{}.png')}", reading)


def test_groups_are_those_of_all_sources(tmp_path):
    one = images(tmp_path / "a", 12, names="p{:02d}_1.png")
    two = images(tmp_path / "b", 14, names="p{:02d}_2.png")
    images(two, 2, names="x{}.png")
    images(one, 3, names="x{}.png")
    made = open_source(f"flat:{one},flat:{two}", ReadConfig(group="name:(p[0-9]+)_"))
    assert len(np.unique(made.groups)) == 14 + 5
    train, held = split_holdout(made, 10, seed=0)
    assert len(held)
    assert not set(train.groups) & set(held.groups)


def test_planes_of_each_file_are_together(tmp_path):
    for name, count in (("a/0.tif", 2), ("b/0.tif", 3)):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(named(bytes_of(count, 8, 9), "ZYX"))
    images(tmp_path / "c", 2)
    spec = ",".join(f"flat:{tmp_path / name}" for name in "abc")
    made = open_source(spec, ReadConfig(slices="all"), channels=1)
    assert units(made).tolist() == [0, 0, 2, 2, 2, 5, 6]
    names = [made.name(i) for i in range(7)]
    assert len(set(names)) == 7
    assert names[2] == f"{tmp_path}/b/0.tif[0]"


def test_parts_of_a_file_without_a_group_are_together_beside_groups(tmp_path):
    """Also where another source has groups, and theirs has none."""
    one = images(tmp_path / "a", 12, names="p{:02d}_1.png")
    for i in range(3):
        path = tmp_path / f"b/{i}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(named(bytes_of(20, 8, 9), "ZYX"))
    reading = ReadConfig(group="name:(p[0-9]+)_", slices="all")
    made = open_source(f"flat:{one},flat:{tmp_path / 'b'}", reading, channels=1)
    assert len(made) == 12 + 60
    assert len(np.unique(made.groups)) == 12 + 3
    assert [len(set(made.groups[start : start + 20])) for start in (12, 32, 52)] == [1, 1, 1]


def test_statistics_are_those_of_the_mix(tmp_path):
    one, two = images(tmp_path / "a", 30, 200), images(tmp_path / "b", 30, 0)
    means = []
    for weights in ("", "*3"):
        source = open_source(f"flat:{one}{weights},flat:{two}", weighted=True)
        means.append(float(survey(source, 1, 0, 2000).moments()[0]))
    assert means == pytest.approx([0.5 * 200 / 255, 0.75 * 200 / 255], abs=0.01)


def test_a_run_says_its_mix_and_knows_it_again(tmp_path):
    one, two = images(tmp_path / "a", 40, 200), images(tmp_path / "b", 40, 50)
    prints = []
    for weight in ("2", "3"):
        data = DataConfig(train=f"flat:{one}*{weight},flat:{two}", channels=1, holdout=8)
        made = open_images(data, seed=0)
        prints.append(made.fingerprint["content"]["data.train"])
        assert len(made.train) == 72
    assert prints[0] != prints[1]
    row = dict(made.about())["mixed"]
    counts = np.bincount(made.train.mix.of)
    share = 100 * 3 * counts[0] / (3 * counts[0] + counts[1])
    assert row.startswith(f"flat:{one}: {counts[0]} images x 3 = {share:.3g} %; flat:{two}: ")
    copy = open_source(f"flat:{one}*3,flat:{two}", DataConfig(channels=1), weighted=True)
    assert fingerprint(copy) == prints[1]


def test_a_run_on_a_mix_has_epochs_of_its_draws(tmp_path):
    train = "digits:train*2,digits:val*0.5"
    run = session_of("mae", tmp_path, "--data.train", train, "--data.holdout", "0")
    plan = dict(run.plan(run.about()))
    assert plan["images"].startswith("1,797 train")
    assert plan["mixed"].startswith("digits:train: 1,438 images x 2 = 94.1 %; digits:val: 359 ")
    assert run.order.n == 2 * 1438 + 180
    assert plan["labels"].startswith("10 classes, from scikit-learn")


def test_a_run_says_why_nothing_is_held_out(tmp_path):
    spec = f"flat:{images(tmp_path / 'a', 140, names='p{:03d}.png')}"
    for flags, said in (
        (("--data.group", "name:p([0-9])"), "none held out: 2 groups, fewer than 10; give "),
        (("--data.holdout", "0"), "none held out"),
    ):
        run = session_of("mae", tmp_path, "--data.train", spec, "--data.holdout", "5", *flags)
        assert dict(run.plan(run.about()))["images"].partition(", ")[2].startswith(said)


def test_a_source_that_cannot_be_read_as_asked_is_told_at_once(tmp_path):
    one, two = images(tmp_path / "a", 30), tmp_path / "b"
    two.mkdir()
    np.save(two / "0.npy", np.zeros((8, 8, 5), dtype=np.uint8))
    with pytest.raises(UserError, match="have 5 channels"):
        open_images(DataConfig(train=f"flat:{one}*9,flat:{two}", channels=1), seed=0)


def test_a_subset_of_a_subset_keeps_the_mix():
    source = Subset(Subset(mixed(2, 1), np.arange(10, 20)), np.array([9, 0, 1]))
    assert source.mix.of.tolist() == [1, 0, 0]
    assert source.mix.draws == [4, 1]
    assert torch.tensor(Draws(source.mix, 0).at(0, np.arange(5))).bincount().tolist() == [1, 2, 2]
