"""Folders that are classes, and those that are not: splits, masks, strays, a single one."""

import logging
from pathlib import Path

import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.data.base import describe_labels
from ssl_vit.data.class_folders import splits_among
from ssl_vit.data.sources import open_source
from tests.unit.data.test_sources import inside, put


def fill(root: Path, beside: int = 0, **folders: int) -> str:
    """Images: so many in each folder, and directly in ``root``."""
    for name, count in folders.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            put(root / name / f"{i}.png")
    for i in range(beside):
        put(root / f"stray{i}.png")
    return f"folder:{root}"


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "val"), ("train", "val")),
        (("Testing", "Training"), ("Testing", "Training")),
        (("annotations", "train2017", "val2017"), ("train2017", "val2017")),
        (("test",), ("test",)),
        (("test_set", "training_set"), ("test_set", "training_set")),
        (("bus", "train", "truck"), ()),
        (("bus", "test", "val"), ()),
        (("cat", "dog"), ()),
        (("trained", "valley"), ()),
        ((), ()),
    ],
)
def test_names_of_splits(folders, splits):
    assert splits_among(folders) == splits


def test_splits_are_refused_with_what_to_give(tmp_path, caplog):
    spec = fill(tmp_path / "d", train=3, val=2, test=1)
    with pytest.raises(UserError) as caught:
        open_source(spec)
    path = tmp_path / "d"
    assert "splits, not classes (test, train, val)" in str(caught.value)
    given = f"give --data.train folder:{path}/train and --data.val folder:{path}/val;"
    assert given in str(caught.value)
    assert len(open_source(f"flat:{path}")) == 6
    assert "takes the images of test, train, val together" in caplog.text


def test_a_class_named_like_a_split_is_a_class_with_a_word(tmp_path, caplog):
    source = open_source(fill(tmp_path, bus=2, train=2, truck=2))
    assert source.classes == ("bus", "train", "truck")
    assert "folder 'train' is taken for a class, not a split" in caplog.text


@pytest.mark.parametrize(("beside", "within"), [(1, 3), (2, 10)])
def test_stray_images_beside_class_folders_have_no_label(tmp_path, caplog, beside, within):
    """They are trained on; the classes stay."""
    source = open_source(fill(tmp_path, beside, cat=within, dog=within))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [-1] * beside + [0] * within + [1] * within
    assert (source.read(0)[1], source.read(beside)[1]) == (None, 0)
    assert inside(source, tmp_path)[:2] == [
        "stray0.png",
        "stray1.png" if beside > 1 else "cat/0.png",
    ]
    assert f"{beside} of {beside + 2 * within} images lie beside the class folders" in caplog.text
    about = describe_labels(source)
    assert about.startswith("2 classes, from class folders; unknown for")


def test_as_many_images_beside_folders_mean_that_they_are_no_classes(tmp_path, caplog):
    source = open_source(fill(tmp_path, 3, cat=5, dog=5))
    assert (source.labels, source.classes, len(source)) == (None, None, 13)
    assert describe_labels(source) == "none: 3 images lie beside the folders, 10 within"
    assert "is taken without labels: 3 images lie beside" in caplog.text


def test_one_folder_is_no_class(tmp_path):
    source = open_source(fill(tmp_path, cat=3))
    assert (source.labels, source.classes, len(source)) == (None, None, 3)
    assert describe_labels(source) == "none: 'cat' is the only folder, and one class is no label"


@pytest.mark.parametrize("scheme", ["folder", "flat"])
@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("imgs", "Labels")])
def test_masks_beside_images_are_told_as_such(tmp_path, scheme, images, masks):
    for i in range(3):
        put(tmp_path / images / f"{i}.png")
        put(tmp_path / masks / f"{i}{'_mask' if i else ''}.png")
    with pytest.raises(UserError, match=r"holds masks beside images") as caught:
        open_source(f"{scheme}:{tmp_path}")
    assert f"give flat:{tmp_path}/{images} for the images alone" in str(caught.value)
    short = images == "images"
    pairs = f"pairs:{tmp_path}" if short else f"pairs:{tmp_path}/{images}:{tmp_path}/{masks}"
    assert str(caught.value).endswith(pairs)
    assert len(open_source(f"flat:{tmp_path}/{images}")) == 3


def test_masks_in_folders_named_after_those_of_their_images(tmp_path):
    for i in range(3):
        put(tmp_path / "train" / f"{i}.png")
        put(tmp_path / "train_masks" / f"{i}_mask.png")
    with pytest.raises(UserError, match=r"masks beside images .train/, train_masks/.: give flat:"):
        open_source(f"folder:{tmp_path}")
    masked = open_source(fill(tmp_path / "faces", with_mask=3, without_mask=3))
    assert masked.classes == ("with_mask", "without_mask")


def test_masks_among_the_files_are_said(tmp_path, caplog):
    for i in range(4):
        put(tmp_path / f"{i}.png")
        put(tmp_path / f"{i}_mask.png")
    assert len(open_source(f"flat:{tmp_path}")) == 8
    assert "4 of 8 files looked at are named like masks of others, as 0_mask.png" in caplog.text


@pytest.mark.parametrize("inner", ["data", "images"])
def test_splits_in_the_folder_that_has_all_images_are_refused(tmp_path, inner):
    fill(tmp_path / inner, train=2, val=2)
    if inner == "images":
        fill(tmp_path / "labels", train=0, val=0)
    with pytest.raises(UserError, match=f"--data.train folder:{tmp_path}/{inner}/train and"):
        open_source(f"folder:{tmp_path}")


def test_folders_around_and_within_classes_are_told(tmp_path, caplog):
    fill(tmp_path / "zip" / "data", cat=2, dog=2)
    about = describe_labels(open_source(f"folder:{tmp_path / 'zip'}"))
    assert about.endswith("; folder:.../data takes its folders for classes")
    for part in ("bottle/train", "bottle/test", "cable/train"):
        put(tmp_path / "parts" / part / "0.png")
    assert open_source(f"folder:{tmp_path / 'parts'}").classes == ("bottle", "cable")
    assert "classes hold splits (bottle/test, bottle/train)" in caplog.text


def test_folders_of_images_and_of_what_is_no_mask_are_no_classes(tmp_path, caplog):
    """YOLO's labels are texts; other pictures in a folder of labels are no masks of these."""
    for images, labels, name in ((3, 0, "yolo"), (0, 0, "other")):
        fill(tmp_path / name, images=images, labels=labels)
    for i in range(2):
        put(tmp_path / "other" / "images" / f"a{i}.png")
        put(tmp_path / "other" / "labels" / f"b{i}.png")
    caplog.set_level(logging.WARNING)
    for name, count in (("yolo", 3), ("other", 4)):
        source = open_source(f"folder:{tmp_path / name}")
        assert (source.labels, len(source)) == (None, count)
        assert "'images' and 'labels' are no classes" in describe_labels(source)
    source = open_source(fill(tmp_path / "meta", images=3, meta=0))
    assert describe_labels(source) == "none: 'images' alone holds images"


def test_a_pattern_of_files_is_no_folder():
    for given in ("folder:/data/*.png", "flat:/data/{a,b}"):
        with pytest.raises(UserError, match="one folder is needed, not a pattern"):
            open_source(given)
