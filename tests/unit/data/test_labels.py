"""Labels from a CSV file: how images are found in it, and what it may hold."""

import logging
import math
import pickle

import numpy as np
import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.data.base import Source, Subset, describe_labels, known_labels
from ssl_vit.data.labels import align_classes, labelled_by


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
        (("/d/1.jpg",), "1,x\n1,y", "/d/1.jpg: lines 2 and 3 of .* both name it"),
        (("/d/1.jpg",), "1.png,x\n1.gif,y", "/d/1.jpg: lines 2 and 3 of .* both name it"),
        (("/a/1.jpg", "/b/1.jpg"), "1.jpg,x", "'1.jpg' may be /a/1.jpg or /b/1.jpg"),
        (("/a/1.jpg", "/a/1.png"), "1,x", "'1' may be /a/1.jpg or /a/1.png"),
        (("/d/1.5",), "1,x", "has no line for any of 1 images; first: /d/1.5, and in the file: 1"),
        (("/d/11.jpg",), "1.jpg,x", "has no line for any of 1 images"),
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
    one = labelled_by(FOLDER, path, columns=("round",))
    assert (one.classes, one.labels.tolist()) == (("0", "1"), [0, 1, 0])
    again = align_classes(found, labelled_by(FOLDER, path, columns=("old", "red", "round")))
    np.testing.assert_array_equal(again.targets, found.targets)
    with pytest.raises(UserError, match=r"has the labels old, red; named .* red, round, old"):
        align_classes(found, some)


def test_parts_of_one_data_set_have_the_same_classes(table):
    """From one file, and from two when the second is aligned with the first."""
    path = table("name,class\n1.jpg,x\n2.jpg,z\n3.png,y\n")
    train, val = (labelled_by(Named(*n), path) for n in (FOLDER.names[:2], FOLDER.names[2:]))
    assert train.classes == val.classes == ("x", "y", "z")
    assert val.labels.tolist() == [1]
    other = labelled_by(Named("9.jpg"), table("name,class\n9.jpg,z\n"))
    other = align_classes(train, other)
    assert (other.classes, other.labels.tolist()) == (train.classes, [2])


def lines(head: str, row) -> str:
    """A table of FOLDER's images, labelled cat, dog, cat."""
    words = ("cat", "dog", "cat")
    rows = [row(i, name.split("/", 2)[2], words[i]) for i, name in enumerate(FOLDER.names)]
    return "\n".join([head, *rows])


EXCEL = lines("image;label", lambda i, name, word: f"{name};{word}é")


@pytest.mark.parametrize(
    ("text", "image", "origin", "unused"),
    [
        (lines("a|b", lambda i, n, w: f"{n}|{w}"), "a", "b", ""),
        (lines("image,label,,", lambda i, n, w: f"{n},{w},,"), "image", "label", ""),
        (
            lines("image,label", lambda i, n, w: f"{n},{w}").replace("\n", "\r"),
            "image",
            "label",
            "",
        ),
        ("sep=;\r\n" + lines("image;label", lambda i, n, w: f"{n};{w}"), "image", "label", ""),
        (lines(",image,label", lambda i, n, w: f"{i},{n},{w}"), "image", "label", ""),
        (lines("Unnamed: 0,n,kind", lambda i, n, w: f"{i},{n},{w}"), "n", "kind", "Unnamed: 0"),
        (lines("image,label,split", lambda i, n, w: f"{n},{w},train"), "image", "label", "split"),
        (lines("image,kind,fold", lambda i, n, w: f"{n},{w},{i % 2}"), "image", "kind", "fold"),
        (lines("label,Path", lambda i, n, w: f"{w},{n}"), "Path", "label", ""),
        (lines("id,file,who,y", lambda i, n, w: f"{i},{n},p{i},{w}"), "file", "y", "id, who"),
        (lines("image,who,kind", lambda i, n, w: f"{n},p{i},{w}"), "image", "kind", "who"),
        (lines("image,label,a,b", lambda i, n, w: f"{n},{w},1,0"), "image", "label", "a, b"),
        (
            lines("name,class", lambda i, n, w: f"C:\\d\\{n.replace('/', chr(92))},{w}"),
            "name",
            "class",
            "",
        ),
        (lines("name,class", lambda i, n, w: f"../old/place/{n},{w}"), "name", "class", ""),
        (lines("name,class", lambda i, n, w: f"{n},{w}\n\n ,"), "name", "class", ""),
    ],
)
def test_columns_are_told_by_name_and_by_what_they_hold(text, image, origin, unused, table, caplog):
    """What is taken, and what is not, is said."""
    caplog.set_level(logging.INFO)
    found = labelled_by(FOLDER, table(text))
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [0, 1, 0])
    rest = f"; not used: {unused}" if unused else ""
    assert caplog.text.strip().endswith(f"labels from {origin}, images by column {image}{rest}")
    assert describe_labels(found) == f"2 classes, from column {origin} of labels.csv"


def test_numbers_that_could_be_names_of_images_lose_to_their_column(table):
    """An index column of 0, 1, 2 beside images 0.png, 1.png, 2.png in another order."""
    source = Named("/d/0.png", "/d/1.png", "/d/2.png")
    found = labelled_by(source, table(",image,label\n0,2.png,a\n1,0.png,b\n2,1.png,c\n"))
    assert found.labels.tolist() == [1, 2, 0]


def test_of_columns_of_all_kinds_those_of_outcomes_are_several_labels(table):
    text = lines(
        "Path,Sex,Age,Edema,Mass", lambda i, n, w: f"{n},F,{40 + i},{i % 2}.0,{'1.0' * (i == 2)}"
    )
    found = labelled_by(FOLDER, table(text))
    assert found.classes == ("Edema", "Mass")
    np.testing.assert_array_equal(found.targets[:, 1], np.array([np.nan, np.nan, 1], np.float32))
    both = lines("image,kind,colour", lambda i, n, w: f"{n},{w},{'red' if i else 'blue'}")
    with pytest.raises(
        UserError, match=r"may be labels \(kind, colour\): name one with --data.label"
    ):
        labelled_by(FOLDER, table(both))
    assert labelled_by(FOLDER, table(both), ("kind",)).classes == ("cat", "dog")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_encodings_of_excel(encoding, table, caplog):
    found = labelled_by(FOLDER, table(EXCEL.encode(encoding)))
    assert found.classes == ("caté", "dogé")
    assert ("read as Windows-1252" in caplog.text) == (encoding == "cp1252")


def test_without_a_header_columns_are_numbered_and_no_line_is_lost(table, caplog):
    found = labelled_by(FOLDER, table(lines("", lambda i, n, w: f"{n},{w}").lstrip()))
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [0, 1, 0])
    assert "has no header: its columns are column 1, column 2" in caplog.text


def test_images_without_a_line_have_no_label_and_are_counted(table, caplog):
    found = labelled_by(FOLDER, table("name,class\n2.jpg,x\n"))
    assert found.labels.tolist() == [-1, 0, -1]
    assert (
        "has no line for 2 of 3 images, which have no label; the first: /data/a/1.jpg"
        in caplog.text
    )
    several = labelled_by(FOLDER, table("name,a,b\n2.jpg,1,0\n"))
    assert known_labels(several).tolist() == [False, True, False]


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
        ("name,a,b\n1.jpg,1,yes\n", "several columns that may be labels .a, b.: name one"),
        ("name,class\n1.jpg,\n", "column 'class' holds no label: it is always blank"),
        (b"name,class\n1.jpg,\x81\n", "no text in UTF-8, UTF-16 or Windows-1252"),
        (b"name,class\n1.jpg,\0\n", "no text in UTF-8"),
        (b"PK\x03\x04 and so on", "an Excel workbook: save it as CSV"),
        ('name,class\n1.jpg,"x\n', "no CSV file: unexpected end"),
        ("name,y\n1.jpg,0.25\n2.jpg,0.5\n", "holds numbers such as .'0.25'., which are no classes"),
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
    with pytest.raises(
        UserError, match="line 2: b is 'yes'; several columns hold 1, 0, or nothing"
    ):
        labelled_by(FOLDER, table("name,a,b\n1.jpg,1,yes\n"), columns=("a", "b"))
