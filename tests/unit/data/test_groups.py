"""Groups: how they are told, and that no split ever parts one."""

import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data import groups
from ssl_vit.data.base import Source, Subset, split_holdout, units
from ssl_vit.data.groups import group_count, groups_of, numbered, shared_groups
from ssl_vit.data.images import open_images
from ssl_vit.data.labels import labelled_by
from ssl_vit.data.pairs import open_pairs
from ssl_vit.data.slices import Planes
from ssl_vit.data.sources import open_source
from tests.unit.data.test_dicom import written
from tests.unit.data.test_labels import Named
from tests.unit.data.test_slices import bytes_of, named

SMALL = np.arange(64, dtype=np.uint8).reshape(8, 8)


class Grouped(Source):
    """Images that have nothing but a group."""

    def __init__(self, numbers: list[int]) -> None:
        self.spec, self.groups = "grouped", np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.groups)


def same_partition(groups: np.ndarray, names: list[str]) -> bool:
    """True if images are of equal groups where their names are equal."""
    of = np.array(names)
    return np.array_equal(groups[:, None] == groups, of[:, None] == of)


def archive(folder: Path, patients: list[str | None], pixels: np.ndarray = SMALL) -> Path:
    """DICOM files 00.dcm ..., of these patients; None: the element is missing."""
    folder.mkdir()
    for i, patient in enumerate(patients):
        own = {} if patient is None else {"PatientID": patient}
        (folder / f"{i:02d}.dcm").write_bytes(written(pixels, **own))
    return folder


# --- splits -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.integers(-3, 25), min_size=1, max_size=120),
    count=st.integers(0, 150),
    seed=st.integers(0, 5),
    parts=st.sampled_from([2, 5, 10]),
)
def test_a_split_parts_no_group(numbers, count, seed, parts):
    source = Grouped(numbers)
    train, held = split_holdout(source, count, seed, parts)
    both = np.concatenate([train.indices, held.indices])
    assert sorted(both.tolist()) == list(range(len(numbers)))
    assert not set(train.groups) & set(held.groups)
    sizes = np.unique(numbers, return_counts=True)[1]
    if count == 0 or len(sizes) < parts:
        assert len(held) == 0
    else:
        assert 0 < len(held) <= max(sizes.min(), min(count, len(numbers) // parts))
    np.testing.assert_array_equal(
        split_holdout(source, count, seed, parts)[1].indices, held.indices
    )
    np.testing.assert_array_equal(Subset(held, np.arange(len(held))).groups, held.groups)


def test_a_large_group_is_passed_over():
    """It may not be held out alone, nor keep others from it."""
    source = Grouped([0] * 500 + [i for i in range(1, 101) for _ in range(5)])
    for seed in range(20):
        train, held = split_holdout(source, 100, seed)
        assert len(held) == 100
        assert 0 not in held.groups
        assert len(train) == 900


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("name:(p[0-9]+)_", ["p1", "p1", "p2", "p2"]),
        ("name:p[0-9]+", ["p1", "p1", "p2", "p2"]),
        ("name:_([0-9])", ["1", "2", "1", "3"]),
        ("name:^([a-z]+)/", ["a", "b", "a", "b"]),
    ],
)
def test_a_pattern_finds_groups_in_paths_within_the_source(pattern, expected, tmp_path):
    """A match in the folder's own path would make one group of all."""
    for i, place in enumerate(("one_p7_9", "two")):
        for file in ("a/p1_1.png", "b/p1_2.png", "a/p2_1.png", "b/p2_3.png"):
            path = tmp_path / place / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes([i]))
    found = []
    for place in ("one_p7_9", "two"):
        source = open_source(f"folder:{tmp_path / place}", ReadConfig(group=pattern))
        by_file = {source.inner_name(i): i for i in range(4)}
        order = [by_file[f] for f in ("a/p1_1.png", "b/p1_2.png", "a/p2_1.png", "b/p2_3.png")]
        assert same_partition(source.groups[order], expected)
        found.append(source.groups)
    np.testing.assert_array_equal(*found)


def test_of_shards_the_name_is_that_of_the_shard_and_the_key():
    source = open_tar_of_two()
    assert [source.inner_name(i) for i in range(2)] == ["x-0.tar:p1/a", "x-1.tar:p1/b"]
    assert [source.inner_name(-1)] == ["x-1.tar:p1/b"]


def open_tar_of_two() -> Source:
    from ssl_vit.data.names import Names
    from ssl_vit.data.tar import TarSource
    from ssl_vit.data.tar_index import ShardIndex

    indexes = [
        ShardIndex(np.zeros(1, np.int64), np.ones(1, np.int64), Names.of([name]), True)
        for name in (b"p1/a.png", b"p1/b.png")
    ]
    rows = [np.zeros(1, dtype=np.int64)] * 2
    return TarSource("tar:x", ["/some/where/x-0.tar", "/some/where/x-1.tar"], indexes, rows, False)


def test_images_without_a_group_are_each_one_of_their_own(caplog):
    source = Named("p1/a", "x", "p1/b", "y", "z", "w")
    source.reading = ReadConfig(group="name:(p[0-9])")
    with caplog.at_level(logging.INFO, "ssl_vit"):
        found = groups_of(source)
    assert same_partition(found, ["p", "1", "p", "2", "3", "4"])
    assert (found < 0).tolist() == [False, True, False, True, True, True]
    assert (
        "warning: named: 4 of 6 images have no group by names ((p[0-9])), and each is one of its "
        "own: x, y, z ..." in caplog.text
    )
    assert "named: 5 groups by names ((p[0-9])), of at most 2 images" in caplog.text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("p1", "p1"), "all images are of one group"),
        (("p1", "p2"), "no two images are of one group"),
    ],
)
def test_a_grouping_that_does_nothing_is_said(names, text, caplog):
    source = Named(*names)
    numbered(source, names, "tests")
    assert text in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "name:"}, "--data.group is 'name:'; it lacks what follows 'name:'"),
        ({"group": "name:("}, "it is no regular expression"),
        ({"group": "column:patient"}, "a column needs --data.labels CSV"),
    ],
)
def test_a_mistake_is_told_before_anything_is_read(options, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(".", r"\.")):
        ReadConfig(**options)


def test_no_group_at_all_is_refused_with_the_name_that_was_searched():
    source = Named("a/1.jpg", "b/2.jpg")
    source.reading = ReadConfig(group="name:patient([0-9]+)")
    with pytest.raises(UserError) as error:
        groups_of(source)
    assert str(error.value) == (
        "--data.group is 'name:patient([0-9]+)': no image of named has a group by names "
        "(patient([0-9]+)); the first of 2 is a/1.jpg"
    )


# --- columns ------------------------------------------------------------------------------------

TABLE = "image,PatientID,finding\n1.jpg,p1,a\n2.jpg,p1,b\n3.png,,a\n"


@pytest.mark.parametrize("group", ["PatientID", "column:PatientID"])
def test_a_column_of_the_csv(group, tmp_path, caplog):
    """It is no label; and a column comes before a DICOM keyword of the same name."""
    source = Named("/d/1.jpg", "/d/2.jpg", "/d/3.png")
    source.reading = ReadConfig(group=group, labels="x")
    path = tmp_path / "t.csv"
    path.write_text(TABLE)
    with caplog.at_level(logging.INFO, "ssl_vit"):
        found = labelled_by(source, path)
    assert same_partition(found.groups, ["p1", "p1", "-"])
    assert found.labels.tolist() == [0, 1, 0]
    assert "labels from finding, images by column image\n" in caplog.text
    assert "1 of 3 images have no group by column PatientID of t.csv" in caplog.text


def test_a_csv_of_groups_only_leaves_the_labels(tmp_path):
    source = Named("/d/1.jpg", "/d/2.jpg", "/d/3.png")
    source.reading, source.labels = ReadConfig(group="patient", labels="x"), np.array([2, 1, 0])
    path = tmp_path / "t.csv"
    path.write_text("image,patient\n1.jpg,7\n2.jpg,8\n3.png,7\n")
    found = labelled_by(source, path)
    assert found.labels.tolist() == [2, 1, 0]
    assert same_partition(found.groups, ["7", "8", "7"])


def test_a_column_that_is_not_there_is_told(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(TABLE)
    (tmp_path / "d").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "d" / name).write_bytes(b"x")
    spec = f"flat:{tmp_path / 'd'}"
    with pytest.raises(UserError, match="has the columns image, PatientID, finding"):
        open_source(spec, ReadConfig(group="column:patient", labels=str(path)))
    pytest.importorskip("pydicom")
    with pytest.raises(UserError) as error:
        open_source(spec, ReadConfig(group="PatientId", labels=str(path)))
    assert "no DICOM keyword of one value (nearest known: PatientID" in str(error.value)
    assert f"no column of {path} (image, PatientID, finding), and" in str(error.value)
    assert "a pattern is written name:PATTERN" in str(error.value)
    with pytest.raises(UserError, match=r"; a column needs --data\.labels CSV, and a pattern is"):
        open_source(spec, ReadConfig(group="patient"))


# --- DICOM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["PatientID", "dicom:PatientID"])
def test_patients_of_dicom_files(group, tmp_path, caplog):
    patients = [f"P{i // 2}" for i in range(24)]
    folder = archive(tmp_path / "x", [*patients, None, " "])
    (folder / "zz.dcm").write_bytes(written(SMALL)[:200])
    source = open_source(f"flat:{folder}", ReadConfig(group=group), channels=1)
    assert same_partition(source.groups, [*patients, "-1", "-2", "-3"])
    assert "3 of 27 images have no group by PatientID of DICOM" in caplog.text
    for part in (source, open_source(f"kept:flat:{folder}", source.reading, 1)):
        train, held = split_holdout(part, 500, seed=0)
        assert len(held) > 0
        assert not set(train.groups) & set(held.groups)
    kept, other = (open_source(f"{p}:flat:{folder}", source.reading, 1) for p in ("kept", "held"))
    assert len(kept) + len(other) == 27
    assert not set(kept.groups) & set(other.groups)


def test_frames_are_of_the_patient_of_their_file(tmp_path):
    folder = archive(tmp_path / "x", [f"P{i // 2}" for i in range(24)], np.stack([SMALL] * 3))
    reading = DataConfig(group="PatientID", slices="all", channels=1)
    source = open_source(f"flat:{folder}", reading)
    assert isinstance(source, Planes)
    np.testing.assert_array_equal(units(source), source.groups)
    train, held = split_holdout(source, 10, seed=0)
    assert len(held) == 6  # a patient: two files of three frames
    assert not set(train.groups) & set(held.groups)


def test_only_the_header_is_read_and_progress_is_said(tmp_path, caplog, monkeypatch):
    """Of a series of 100,000 files the pixels would take hours."""
    folder = archive(tmp_path / "x", ["A", "A", "B"])
    source = open_source(f"flat:{folder}")
    source.reading = ReadConfig(group="PatientID")
    longest = []

    class Counting(io.FileIO):
        def close(self) -> None:
            if not self.closed:
                longest.append(self.tell())
            super().close()

    monkeypatch.setattr(source, "stream", lambda i: Counting(source.name(i)), raising=False)
    monkeypatch.setattr(groups, "_SAID", -1.0)
    with caplog.at_level(logging.INFO, "ssl_vit"):
        groups_of(source)
    assert len(longest) == 3
    size = os.path.getsize(folder / "00.dcm")
    assert max(longest) < size - SMALL.nbytes
    assert "PatientID of DICOM read of 2 of 3 files" in caplog.text


# --- two sources --------------------------------------------------------------------------------


def test_a_group_on_both_sides_is_a_warning_with_an_example(tmp_path):
    one = archive(tmp_path / "one", [None, *(f"P{i}" for i in range(6))])
    two = archive(tmp_path / "two", [None, "P4", "P9", "P5", "P4"])
    data = DataConfig(train=f"flat:{one}", val=f"flat:{two}", channels=1, group="PatientID")
    images = open_images(data, seed=0)
    assert len(shared_groups(images.train, images.val)) == 2
    leaked = [line for line in images.warnings if "too" in line]
    assert len(leaked) == 1
    assert leaked[0].startswith("2 of 4 groups of --data.val are in --data.train, too (")
    assert str(two) in leaked[0]
    assert str(one) in leaked[0]
    assert (
        "groups",
        "7 by PatientID, 4 held out: 2 OF THEM ARE ALSO IN TRAINING",
    ) in images.about()
    apart = open_images(DataConfig(train=f"flat:{one}", channels=1, group="PatientID"), seed=0)
    assert not apart.held_out  # of seven groups
    assert ("groups", "7 by PatientID") in apart.about()
    assert apart.warnings == ()


def test_pairs_have_groups_too(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(4):
            (tmp_path / kind / f"s{i // 2}_{i}.png").write_bytes(b"x")
    pairs = open_pairs(f"pairs:{tmp_path}", ReadConfig(group="name:(s[0-9])_"))
    assert group_count(pairs) == 2
    import torch

    np.testing.assert_array_equal(pairs.take(torch.tensor([3, 0])).groups, pairs.groups[[3, 0]])


def test_planes_without_groups_belong_to_their_files(tmp_path):
    (tmp_path / "a.tif").write_bytes(named(bytes_of(3, 8, 9), "ZYX"))
    (tmp_path / "b.tif").write_bytes(named(bytes_of(2, 8, 9), "ZYX"))
    source = open_source(f"flat:{tmp_path}", ReadConfig(slices="all"), channels=1)
    assert units(source).tolist() == [0, 0, 0, 1, 1]
