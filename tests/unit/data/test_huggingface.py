"""Hugging Face data sets: splits, configurations, and which columns hold images and labels."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import describe_labels
from ssl_vit.data.sources import open_source
from tests.unit.data.test_sources import png

datasets = pytest.importorskip("datasets", reason="the extra ssl_vit[hf] is not installed")
IMAGES = [{"bytes": png(value), "path": None} for value in range(6)]
SIX = [0, 1, 2, 0, 1, 2]
INT, TEXT = datasets.Value("int64"), datasets.Value("string")


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO)


PICTURE = ("image", datasets.Image(), IMAGES)


def saved(path: Path, image=PICTURE, **columns) -> str:
    """A saved data set: columns as name=(feature, values)."""
    columns = {image[0]: image[1:], **columns}
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    made = {name: values for name, (_, values) in columns.items()}
    datasets.Dataset.from_dict(made, features=features).save_to_disk(path)
    return f"hf:{path}"


def opened(spec: str, **reading):
    return open_source(spec, ReadConfig(**reading))


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "classes", "labels"),
    [
        (INT, SIX, ("0", "1", "2"), SIX),
        (TEXT, ["cat", "dog", "cat", None, "", "dog"], ("cat", "dog"), [0, 1, 0, -1, -1, 1]),
        (datasets.Value("bool"), [1, 0, 1, None, 1, 0], ("False", "True"), [1, 0, 1, -1, 1, 0]),
        (
            datasets.Value("float32"),
            [0, 1, 2, -1, np.nan, 1],
            ("0", "1", "2"),
            [0, 1, 2, -1, -1, 1],
        ),
        (
            datasets.ClassLabel(names=["a", "b"]),
            [0, 1, -1, 0, None, 1],
            ("a", "b"),
            [0, 1, -1, 0, -1, 1],
        ),
    ],
)
def test_a_label_column_of_any_kind(tmp_path, caplog, kind, values, classes, labels):
    source = opened(saved(tmp_path / "d", text=(TEXT, list("abcdef")), label=(kind, values)))
    assert (source.classes, source.labels.tolist()) == (classes, labels)
    assert source.labels.dtype == np.int64
    assert source.read(4) == (png(4), None if labels[4] < 0 else labels[4])
    assert describe_labels(source).startswith(f"{len(classes)} classes, from column 'label'")
    missing = labels.count(-1)
    assert (f"{missing} of 6 rows have no label in column 'label'" in caplog.text) == bool(missing)


@pytest.mark.parametrize(
    ("item", "values", "classes"),
    [
        (datasets.ClassLabel(names=["a", "b", "c"]), [[0, 1], [], [2], None, [1], [1]], "abc"),
        (TEXT, [["a", "b"], [], ["c"], None, ["b"], ["b"]], "abc"),
        (INT, [[1, 1, 0], [0, 0, 0], [0, 0, 1], None, [0, 1, 0], [0, 1, 0]], "012"),
    ],
)
def test_lists_are_several_labels_an_image(tmp_path, item, values, classes):
    source = opened(saved(tmp_path / "d", labels=(datasets.List(item), values)))
    expected = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1], [np.nan] * 3, [0, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(source.targets, expected.astype(np.float32))
    assert (source.labels, source.classes) == (None, tuple(classes))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"y": (datasets.Value("float32"), [0.5] * 6)}, "column 'y' holds numbers such as 0.5"),
        ({"label": (TEXT, list("abcdef"))}, "column 'label' is another text for each image"),
        ({"label": (INT, [-1] * 6)}, "column 'label' holds no label"),
        (
            {"species": (TEXT, ["a", "b"] * 3)},
            "no column is named 'label' or the like .species.; --",
        ),
        ({}, "it has no other column"),
    ],
)
def test_what_is_no_label_is_said(tmp_path, columns, reason):
    source = opened(saved(tmp_path / "d", **columns))
    assert (source.labels, source.targets, source.classes) == (None, None, None)
    assert re.match(f"none: {reason}", describe_labels(source))


def test_columns_of_labels_that_are_asked_for(tmp_path, caplog):
    spec = saved(
        tmp_path / "d",
        fine=(datasets.ClassLabel(names=list("abc")), SIX),
        coarse=(datasets.ClassLabel(names=["x", "y"]), [0, 1, 1, 0, 1, 1]),
        species=(TEXT, ["cat", "dog"] * 3),
        old=(INT, [0, None, 1] * 2),
        size=(datasets.Value("float32"), [0.5] * 6),
    )
    assert opened(spec).classes == ("a", "b", "c")
    assert "labels of column 'fine' are taken, not of coarse" in caplog.text
    assert opened(spec, label_column=("coarse",)).classes == ("x", "y")
    assert opened(spec, label_column=("species",)).labels.tolist() == [0, 1] * 3
    several = opened(spec, label_column=("old", "coarse"))
    expected = np.array([[0, 0], [np.nan, 1], [1, 1]] * 2, dtype=np.float32)
    np.testing.assert_array_equal(several.targets, expected)
    for column, reason in (("colour", "hf:.* has image, fine,"), ("size", "which holds numbers")):
        with pytest.raises(UserError, match=f"--data.label-column is '{column}'.*{reason}"):
            opened(spec, label_column=(column,))
    with pytest.raises(UserError, match=r"--data.label-column size is 0.5; several"):
        opened(spec, label_column=("size", "old"))


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "struct", "paths", "relative"])
def test_image_columns_that_are_no_image_feature(tmp_path, kind):
    folder = tmp_path / "d"
    column = {
        "binary": ("png", datasets.Value("binary"), [image["bytes"] for image in IMAGES]),
        "struct": ("image", {"bytes": datasets.Value("binary"), "path": TEXT}, IMAGES),
        "paths": ("file", TEXT, [str(tmp_path / "files" / f"{i}.png") for i in range(6)]),
        "relative": ("file", TEXT, [f"pictures/{i}.png" for i in range(6)]),
    }[kind]
    spec = saved(folder, column, caption=(TEXT, list("abcdef")))
    for place in (tmp_path / "files", folder / "pictures"):
        place.mkdir()
        for i in range(6):
            (place / f"{i}.png").write_bytes(png(i))
    source = opened(spec)
    assert [source.read(i)[0] for i in (0, 5)] == [png(0), png(5)]


@pytest.mark.parametrize(
    ("column", "asked", "reason"),
    [
        (("url", TEXT, ["http://x/1.png"] * 6), "", "only: url; url holds addresses; download"),
        (("url", TEXT, ["http://x/1.png"] * 6), "url", "'url', which holds addresses"),
        (("views", datasets.List(datasets.Image()), [IMAGES[:2]] * 6), "", "views holds several"),
        (("file", TEXT, ["no/1.png"] * 6), "", "column 'file' names files; there is no no/1.png"),
        (
            ("pixels", datasets.Array2D((2, 2), "uint8"), [np.zeros((2, 2), np.uint8)] * 6),
            "",
            "pixels is",
        ),
        (PICTURE, "picture", "--data.image is 'picture'; .* has image"),
    ],
)
def test_images_that_cannot_be_read_are_told_in_one_line(tmp_path, column, asked, reason):
    with pytest.raises(UserError, match=reason) as caught:
        opened(saved(tmp_path / "d", column), image=asked)
    assert "\n" not in str(caught.value)


def test_of_several_image_columns_the_first_is_taken_and_said(tmp_path, caplog):
    spec = saved(tmp_path / "d", right=(datasets.Image(), IMAGES[::-1]))
    assert opened(spec).read(0)[0] == png(0)
    assert "images of column 'image' are taken, not of right; --data.image" in caplog.text
    assert opened(spec, image="right").read(0)[0] == png(5)


# --- splits and configurations ------------------------------------------------------------------


def test_splits_have_several_names(tmp_path, caplog):
    saved(tmp_path / "d", label=(INT, SIX))
    made = datasets.load_from_disk(tmp_path / "d")
    parts = datasets.DatasetDict(train=made, validation=made.select([0, 1]))
    parts.save_to_disk(tmp_path / "parts")
    spec = f"hf:{tmp_path / 'parts'}"
    for split, count in (("", 6), (":train", 6), (":validation", 2), (":val", 2), (":dev", 2)):
        assert len(opened(spec + split)) == count
    assert "parts:val: its split 'validation' is taken" in caplog.text
    with pytest.raises(UserError, match="no split 'test', only: train, validation"):
        opened(f"{spec}:test")
    with pytest.raises(UserError, match="a saved data set has no configurations, drop '#x'"):
        opened(f"{spec}#x")
    datasets.DatasetDict(test=made).save_to_disk(tmp_path / "single")
    assert len(opened(f"hf:{tmp_path / 'single'}")) == 6
    assert "its split 'test' is taken" in caplog.text


def test_configurations(tmp_path, monkeypatch):
    """As of a data set on the Hub; here a local folder that `load_dataset` takes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    saved(tmp_path / "d", label=(INT, SIX))
    made = datasets.load_from_disk(tmp_path / "d")
    lines = ["---", "configs:"]
    for config, rows in (("small", [0]), ("large", SIX)):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "validation"):
            file = f"{config}-{split}.parquet"
            (tmp_path / "hub").mkdir(exist_ok=True)
            made.select(rows).to_parquet(tmp_path / "hub" / file)
            lines += [f"  - split: {split}", f"    path: {file}"]
    (tmp_path / "hub" / "README.md").write_text("\n".join([*lines, "---"]))
    spec = f"hf:{tmp_path / 'hub'}"
    assert [len(opened(f"{spec}#{c}")) for c in ("small", "large", "large:val")] == [1, 6, 6]
    assert len(opened(f"{spec}#large:train[:2]")) == 2
    for given in (spec, f"{spec}#medium"):
        with pytest.raises(
            UserError, match=r"configurations are \['small', 'large'\]; give one as"
        ):
            opened(given)
    with pytest.raises(UserError, match="no split 'test', only: train, validation"):
        opened(f"{spec}#small:test")
