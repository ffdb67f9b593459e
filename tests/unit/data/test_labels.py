"""Labels from a CSV file: how images are found in it, and what it may hold."""

import math
import pickle

import numpy as np
import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.data.base import Source, Subset
from ssl_vit.data.labels import labelled_by


class Named(Source):
    """Images that have nothing but a name."""

    def __init__(self, *names: str):
        self.names, self.spec = names, "named"
        self.labels = np.zeros(len(names), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> tuple[bytes, int | None]:
        return self.names[i].encode(), self.label(i)

    def name(self, i: int) -> str:
        return self.names[i]


FOLDER = Named("/data/a/1.jpg", "/data/a/2.jpg", "/data/b/3.png")
SHARDS = Named("/data/x-0.tar:k1", "/data/x-0.tar:k2", "/data/x-1.tar:k3")


@pytest.fixture
def table(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "labels.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (FOLDER, ("/data/a/1.jpg", "/data/a/2.jpg", "/data/b/3.png")),
        (FOLDER, ("a/1.jpg", "a/2.jpg", "b/3.png")),
        (FOLDER, ("./a/1.jpg", "./a/2.jpg", "./b/3.png")),
        (FOLDER, ("1.jpg", "2.jpg", "3.png")),
        (FOLDER, ("1", "a/2", "3.jpg")),
        (SHARDS, ("k1", "k2", "k3")),
        (SHARDS, ("k1.jpg", "k2.jpg", "k3.png")),
        (SHARDS, ("x-0.tar:k1", "x-0.tar:k2", "x-1.tar:k3")),
        (SHARDS, SHARDS.names),
        (Named("digits[7]", "digits[12]", "digits[1]"), ("digits[7]", "digits[12]", "digits[1]")),
        (Named("/d/im.001.jpg", "/d/im.002.jpg", "/d/im"), ("im.001", "im.002", "im")),
        (Named("/d/1.jpg", "/d/1.png", "/d/e/1.jpg"), ("d/1.jpg", "1.png", "e/1.jpg")),
    ],
)
def test_images_are_found_by_their_names(source, names, table):
    """Whatever the order of the lines; those of other images are left alone."""
    lines = [f"{name},{word}" for name, word in zip(names, ("one", "two", "three"), strict=True)]
    path = table("\n".join(["name,class", "other.jpg,two", *reversed(lines)]))
    found = labelled_by(source, path)
    assert found.classes == ("one", "three", "two")
    assert found.labels.tolist() == [0, 2, 1]
    assert found.read(1) == (source.names[1].encode(), 2)
    assert found.name(2) == source.names[2]
    assert str(path) in found.spec


@pytest.mark.parametrize(
    ("names", "lines", "message"),
    [
        (("/d/1.jpg", "/d/2.jpg"), "1.jpg,x", "has no line for 1 of 2 images; first: /d/2.jpg"),
        (("/d/1.jpg",), "1,x\n1,y", "/d/1.jpg: lines 2 and 3 of .* both name it"),
        (("/d/1.jpg",), "1.png,x\n1.gif,y", "/d/1.jpg: lines 2 and 3 of .* both name it"),
        (("/a/1.jpg", "/b/1.jpg"), "1.jpg,x", "'1.jpg' may be /a/1.jpg or /b/1.jpg"),
        (("/a/1.jpg", "/a/1.png"), "1,x", "'1' may be /a/1.jpg or /a/1.png"),
        (("/d/1.5",), "1,x", "has no line for 1 of 1 images"),
        (("/d/11.jpg",), "1.jpg,x", "has no line for 1 of 1 images"),
    ],
)
def test_images_without_one_line_of_their_own_are_refused(names, lines, message, table):
    with pytest.raises(UserError, match=message) as caught:
        labelled_by(Named(*names), table(f"name,class\n{lines}\n"))
    assert "\n" not in str(caught.value)


# --- what is in the file ------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_dialects(delimiter, start, end, table):
    rows = [
        (f'"a{delimiter}name"', "the kind"),
        ("1.jpg", '"a cat, or ""so""; é"'),
        ("", ""),
        ("2.jpg", "dog"),
    ]
    text = end.join(delimiter.join(row) for row in rows)
    found = labelled_by(Named("/d/1.jpg", "/d/2.jpg"), table(start + text.encode()))
    assert found.classes == ('a cat, or "so"; é', "dog")
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (("10", "9", "010"), ("9", "010", "10"), [2, 0, 1]),
        (("10", "9", "x"), ("10", "9", "x"), [0, 1, 2]),
        (("1", "0", "1"), ("0", "1"), [1, 0, 1]),
        (("b", "", "a"), ("a", "b"), [1, -1, 0]),
        (("5", "-1", "3"), ("3", "5"), [1, -1, 0]),
    ],
)
def test_one_column_is_a_class(values, classes, labels, table):
    lines = [f"{i},{v}" for i, v in zip(("1.jpg", "2.jpg", "3.png"), values, strict=True)]
    found = labelled_by(FOLDER, table("\n".join(["name,class", *lines])))
    assert (found.classes, found.labels.tolist(), found.targets) == (classes, labels, None)
    assert found.labels.dtype == np.int64
    assert [found.label(i) for i in range(3)] == [None if c == -1 else c for c in labels]


def test_several_columns_are_labels_that_do_not_exclude_each_other(table):
    path = table("name,red,round,old\n1.jpg,1,0,\n2.jpg,-1,1.0,0\n3.png,0,0,1\n")
    found = labelled_by(FOLDER, path)
    assert found.classes == ("red", "round", "old")
    assert found.labels is None
    assert found.read(0) == (b"/data/a/1.jpg", None)
    expected = [[1, 0, math.nan], [math.nan, 1, 0], [0, 0, 1]]
    np.testing.assert_array_equal(found.targets, np.array(expected, dtype=np.float32))
    assert found.targets.dtype == np.float32
    some = labelled_by(FOLDER, path, columns=("old", "red"))
    np.testing.assert_array_equal(some.targets, found.targets[:, [2, 0]])
    again = labelled_by(FOLDER, path, classes=("round", "red"))
    np.testing.assert_array_equal(again.targets, found.targets[:, [1, 0]])
    one = labelled_by(FOLDER, path, columns=("round",))
    assert (one.classes, one.labels.tolist()) == (("0", "1.0"), [0, 1, 0])


def test_parts_of_one_data_set_have_the_same_classes(table):
    """From one file, and from two when the second is given the classes of the first."""
    path = table("name,class\n1.jpg,x\n2.jpg,z\n3.png,y\n")
    train, val = (labelled_by(Named(*n), path) for n in (FOLDER.names[:2], FOLDER.names[2:]))
    assert train.classes == val.classes == ("x", "y", "z")
    assert val.labels.tolist() == [1]
    other = labelled_by(Named("9.jpg"), table("name,class\n9.jpg,z\n"), train.classes)
    assert (other.classes, other.labels.tolist()) == (train.classes, [2])
    with pytest.raises(UserError, match=r"line 3: 'zz' is none of the classes .nearest known: z"):
        labelled_by(Named("9.jpg"), table("name,class\n9.jpg,z\n8.jpg,zz\n"), train.classes)


def test_it_is_a_source_like_any_other(table):
    found = labelled_by(FOLDER, table("name,a,b\n1.jpg,1,0\n2.jpg,0,0\n3.png,,1\n"))
    part = pickle.loads(pickle.dumps(Subset(found, np.array([2, 0]))))
    assert len(part) == 2
    assert part.name(0) == "/data/b/3.png"
    np.testing.assert_array_equal(part.targets, [[math.nan, 1], [1, 0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no labels"),
        ("name,class\n", "holds no labels"),
        ("name\n1.jpg\n", "line 1 is 'name': it needs a name and a label"),
        ("name,class\n1.jpg,x,y\n", "line 2 has 3 cells; the header has 2"),
        ("name,a,a\n1.jpg,1,0\n", "two columns named .'a'"),
        ("name,a,b\n1.jpg,1,yes\n", "line 2: b is 'yes'; several columns hold 1, 0, or nothing"),
        ("name,class\n1.jpg,\n", "holds no label: class is always blank"),
        (b"name,class\n1.jpg,\xff\n", "no CSV file in UTF-8"),
        ('name,class\n1.jpg,"x\n', "no CSV file in UTF-8"),
    ],
)
def test_files_that_cannot_be_used_are_refused(text, message, table):
    with pytest.raises(UserError, match=message) as caught:
        labelled_by(Named("1.jpg"), table(text))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path, table):
    with pytest.raises(UserError, match=r"cannot read the labels .*none.csv: No such file"):
        labelled_by(FOLDER, tmp_path / "none.csv")
    with pytest.raises(UserError, match="has no column 'c'; allowed: a, b"):
        labelled_by(FOLDER, table("name,a,b\n1.jpg,1,0\n"), columns=("c",))
