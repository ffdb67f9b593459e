"""Shards: which members are images, which of a sample is taken, and their labels; all is said."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data import tar_index
from ssl_vit.data.base import describe_labels
from ssl_vit.data.sources import open_source
from tests.unit.data.test_sources import png, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch, caplog):
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    caplog.set_level(logging.INFO)


def names(source) -> list[str]:
    return [source.name(i).rpartition(":")[2] for i in range(len(source))]


def opened(path, members, **reading):
    if members is not None:
        write_tar(path, members)
    return open_source(f"tar:{path}", ReadConfig(**reading))


def grid(*parts: list[str]) -> list[str]:
    """All names of one of each part."""
    found = [""]
    for part in parts:
        found = [a + b for a in found for b in part]
    return found


SLICES = grid(["a", "b"], [f".slice{k}" for k in range(3)], [".png"])
ROLES = grid(["a", "b", "c"], [".depth.png", ".mask.png", ".rgb.png"])
UIDS = grid(["1.2.840."], ["7", "8"], [f".{k}.png" for k in range(3)])
DRAFTS = grid(["a", "b"], [".draft.jpg", ".final.jpg"])


@pytest.mark.parametrize("members", [SLICES, UIDS, [f"x.{c}{c}.png" for c in "abcdefghijklmnopqr"]])
def test_names_with_dots_are_samples_of_their_own(tmp_path, caplog, members):
    """Images whose extensions differ in digits, or are too many to be parts of a sample."""
    source = opened(tmp_path / "a.tar", {name: png(i) for i, name in enumerate(members)})
    assert names(source) == [name.removesuffix(".png") for name in members]
    assert [source.read(i)[0] for i in range(len(source))] == [png(i) for i in range(len(members))]
    assert "names have dots of their own" in caplog.text
    assert "--data.key webdataset" in caplog.text


def test_all_that_is_not_used_is_said_with_the_remedy(tmp_path, caplog):
    members = {name: png(i) for i, name in enumerate(SLICES)}
    source = opened(tmp_path / "a.tar", members, key="webdataset")
    assert names(source) == ["a", "b"]
    assert "6 images share 2 keys, 4 are not used: of each sample slice0.png" in caplog.text
    assert "--data.key full takes each as a sample of its own" in caplog.text


def test_of_several_parts_the_one_that_sounds_like_an_image_is_taken(tmp_path, caplog):
    """The same part of every sample, whatever comes first in the shard."""
    order = [*ROLES[:3], *reversed(ROLES[3:])]
    members = {name: name.encode() for name in order} | {"a.npy": b"\x93NUMPY"}
    source = opened(tmp_path / "a.tar", members)
    assert [source.read(i)[0] for i in range(3)] == [b"a.rgb.png", b"c.rgb.png", b"b.rgb.png"]
    assert "7 are not used: of each sample rgb.png is taken, not " in caplog.text
    assert "warning" in caplog.text


@pytest.mark.parametrize(
    ("members", "reading", "taken"),
    [
        (ROLES, {"image": "mask.png"}, ["a", "b", "c"]),
        (ROLES, {"image": ".MASK.png"}, ["a", "b", "c"]),
        (ROLES, {"key": "full"}, [name.removesuffix(".png") for name in ROLES]),
        (ROLES, {"key": "full", "image": "rgb.png"}, ["a.rgb", "b.rgb", "c.rgb"]),
        (SLICES, {"image": "slice1.png"}, ["a", "b"]),
        (SLICES, {"image": "png"}, [name.removesuffix(".png") for name in SLICES]),
        (DRAFTS, {}, ["a", "b"]),
        (DRAFTS, {"key": "full"}, ["a.draft", "a.final", "b.draft", "b.final"]),
        (["x.png", "x.jpg", "y.jpg"], {"key": "full"}, ["x", "y"]),
        (["x.png", "x.jpg", "y.jpg"], {"image": "png"}, ["x"]),
    ],
)
def test_keys_and_images_that_are_asked_for(tmp_path, members, reading, taken):
    """One index serves every choice, whichever is made first."""
    opened(tmp_path / "a.tar", {name: name.encode() for name in members})
    source = opened(tmp_path / "a.tar", None, **reading)
    assert names(source) == taken
    if "image" in reading:
        end = reading["image"].lower().removeprefix(".")
        assert all(source.read(i)[0].decode().endswith(end) for i in range(len(source)))
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_an_image_that_is_missing_is_said(tmp_path, caplog):
    members = dict.fromkeys([*ROLES, "d.mask.png"], b"x")
    assert names(opened(tmp_path / "a.tar", members, image="rgb.png")) == ["a", "b", "c"]
    assert "1 of 4 samples have no rgb.png and are left out" in caplog.text
    with pytest.raises(
        UserError, match=r"--data.image is 'tif'; the images of .* end in mask.png, depth"
    ):
        opened(tmp_path / "a.tar", None, image="tif")


def test_equal_keys_in_two_shards_are_two_samples(tmp_path):
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", {"0.png": shard.encode(), "1.png": b"x"})
    source = open_source(f"tar:{tmp_path}/{{a,b}}.tar")
    assert [source.read(i)[0] for i in (0, 2)] == [b"a", b"b"]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_told_by_content_and_the_rest_is_counted(tmp_path, caplog, kind):
    jpeg = io.BytesIO()
    Image.new("L", (4, 3)).save(jpeg, "JPEG")
    long = "deep/" * 30 + "é" * 40
    members = {
        "./a/0.png": png(0),
        "./a/1": png(1),
        "./a/2.dat": jpeg.getvalue(),
        f"./{long}.png": png(3),
        "../b/4.png": png(4),
        "README": b"text",
        "notes.md": b"text",
        "a/0.npz": b"PK\x03\x04",
        "._0.png": b"resource",
        "__MACOSX/a/._0.png": b"resource",
        "a/@eaDir/0.png": png(5),
        ".cache/0.png": png(6),
    }
    write_tar(tmp_path / "a.tar", members, kind)
    source = opened(tmp_path / "a.tar", None)
    assert names(source) == ["a/0", "a/1", "a/2", long, "../b/4"]
    assert source.read(2)[0] == jpeg.getvalue()
    passed = caplog.text.partition("passed over as no images: ")[2]
    assert sorted(passed.strip().split(", ")) == ["1 .md", "1 .npz", "1 without extension"]


def test_of_a_member_written_twice_the_later_one_counts(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for data in (b"old", b"new"):
            member = tarfile.TarInfo("a.png")
            member.size = 3
            archive.addfile(member, io.BytesIO(data))
    source = opened(tmp_path / "a.tar", None)
    assert (len(source), source.read(0)[0]) == (1, b"new")


def test_an_index_of_another_version_is_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "_VERSION", 1)
    opened(tmp_path / "a.tar", {"a.png": png(0)})
    monkeypatch.undo()
    scans = []
    scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *a: scans.append(1) or scan(*a))
    for _ in range(2):
        opened(tmp_path / "a.tar", None)
    assert len(scans) == 1


# --- labels -------------------------------------------------------------------------------------


def labelled(path, ending: str, values, **reading):
    members = {f"{i}.jpg": b"x" for i in range(len(values))}
    raw = [json.dumps(v).encode() if ending == "json" else str(v).encode() for v in values]
    members |= {f"{i}.{ending}": text for i, text in enumerate(raw) if values[i] is not None}
    return opened(path, members, **reading)


@pytest.mark.parametrize(
    ("ending", "values", "classes", "labels", "origin"),
    [
        ("cls", [2, 0, "1\n"], ("0", "1", "2"), [2, 0, 1], ".cls of the shards"),
        ("cls", ["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1], ".cls of the shards"),
        ("cls", [1, -1, 0], ("0", "1"), [1, -1, 0], ".cls of the shards"),
        ("txt", [1, 0, 1], ("0", "1"), [1, 0, 1], ".txt of the shards"),
        ("cls.txt", ["b", "a", "b"], ("a", "b"), [1, 0, 1], ".cls of the shards"),
        ("json", [{"label": k} for k in (1, 0, 1)], ("0", "1"), [1, 0, 1], "'label' in .json of"),
        ("json", [{"Class": k} for k in "aba"], ("a", "b"), [0, 1, 0], "'Class' in .json of"),
        ("json", [{"y": k} for k in (1.0, None, 0)], ("0", "1"), [1, -1, 0], "'y' in .json of"),
        ("json", [{"cls": True}, {}, {"cls": False}], ("False", "True"), [1, -1, 0], "'cls' in"),
    ],
)
def test_labels_of_shards(tmp_path, ending, values, classes, labels, origin):
    source = labelled(tmp_path / "a.tar", ending, values)
    assert (source.classes, source.labels.tolist()) == (classes, labels)
    assert origin in describe_labels(source)
    assert [source.read(i)[1] for i in range(3)] == [None if c < 0 else c for c in labels]
    again = opened(tmp_path / "a.tar", None)  # from the index
    assert (again.classes, again.labels.tolist()) == (classes, labels)


@pytest.mark.parametrize(
    ("ending", "values", "reason"),
    [
        ("txt", ["a cat", "a dog", "a cat"], ".txt of the shards holds a text"),
        ("txt", [1, "a dog", 0], ".txt of the shards holds a text"),
        ("json", [{"label": k} for k in "abc"], "'label' in .json of the shards is another text"),
        ("json", [{"label": k} for k in (0.5, 1, 0)], "holds numbers such as 0.5"),
        ("json", [{"label": [0, 1]}] * 3, "'label' in .json of the shards holds a list"),
        (
            "json",
            [{"caption": "x", "kind": 1}] * 3,
            "in .json or .txt (caption, kind); --data.label",
        ),
        ("json", [[1], [0], [1]], "no .cls, and no label in .json or .txt"),
    ],
)
def test_what_is_no_label_is_said(tmp_path, ending, values, reason):
    source = labelled(tmp_path / "a.tar", ending, values)
    assert (source.labels, source.classes) == (None, None)
    assert describe_labels(source).startswith("none: ")
    assert reason in describe_labels(source)


def test_columns_of_labels_that_are_asked_for(tmp_path):
    values = [
        {"label": "x", "kind": k, "a": i % 2, "b": [1, None, 0][i]} for i, k in enumerate("qrs")
    ]
    path = tmp_path / "a.tar"
    assert labelled(path, "json", values).classes == ("x",)
    source = opened(path, None, label_column=("kind",))
    assert (source.classes, source.labels.tolist()) == (("q", "r", "s"), [0, 1, 2])
    several = opened(path, None, label_column=("b", "a"))
    expected = np.array([[1, 0], [np.nan, 1], [0, 0]], dtype=np.float32)
    np.testing.assert_array_equal(several.targets, expected)
    assert (several.classes, several.labels) == (("b", "a"), None)
    assert opened(path, None).classes == ("x",)  # each choice has an index of its own
    text = labelled(tmp_path / "b.tar", "txt", ["a cat", "a dog"], label_column=("txt",))
    assert text.classes == ("a cat", "a dog")
    with pytest.raises(UserError, match=r"--data.label-column is 'colour'; no sample of"):
        opened(path, None, label_column=("colour",))
    with pytest.raises(UserError, match=r"kind: 'kind' in .json of the shards is 'q'; several"):
        opened(path, None, label_column=("kind", "a"))


def test_a_label_belongs_to_the_image_or_to_its_sample(tmp_path):
    """Also where names have dots: `p.1.cls` is of `p.1.png`, and `q.json` of all `q.*.png`."""
    members = dict.fromkeys(("p.1.png", "p.2.png", "q.1.png", "q.2.png"), b"x")
    members |= {"p.1.cls": b"0", "p.2.cls": b"1", "q.cls": b"2"}
    source = opened(tmp_path / "a.tar", members)
    assert dict(zip(names(source), source.labels.tolist(), strict=True)) == {
        "p.1": 0,
        "p.2": 1,
        "q.1": 2,
        "q.2": 2,
    }


def test_cls_comes_before_json_and_what_is_used_is_not_passed_over(tmp_path, caplog):
    members = {"a.jpg": b"x", "a.cls": b"3", "a.json": b'{"label": 1}', "a.txt": b"7"}
    assert opened(tmp_path / "a.tar", members).labels.tolist() == [3]
    passed = caplog.text.partition("passed over as no images: ")[2].strip()
    assert sorted(passed.split(", ")) == ["1 .json", "1 .txt"]


# --- addresses and patterns ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("tar:az://box/t-{0..2}.tar", "only tar shards are read, by s3.*'tar:/PATH/t-{0..2}.tar'"),
        ("folder:gs://bucket/images", "only tar shards are read.*'folder:/PATH/images'"),
        ("tar:pipe:aws s3 cp s3://bucket/t.tar -", "only tar shards are read.*: copy"),
        ("tar:s3://bucket/a.tar::s3://bucket/b.tar", "joins patterns by '::'"),
        ("s3://bucket/t.tar.gz", "of the network only tar shards are read, named"),
        ("https://huggingface.co/datasets/o/n", "as hf:OWNER/NAME"),
        ("http://host/*.tar", "HTTP cannot list; name the shards by {000..146}"),
        ("s3:bucket/t.tar", "is no address: give s3://PLACE/NAME.tar"),
        ("tar:a.tar::b.tar", "joins patterns by '::'; give one: with braces"),
        ("tar:file:///data/t.tar", "give the path alone, without file://"),
        ("hf:https://huggingface.co/datasets/o/n", "as hf:OWNER/NAME"),
        ("/data/t-{0..2}.tar", "did you mean 'tar:/data/t-{0..2}.tar'"),
    ],
)
def test_what_is_no_path_is_refused_with_what_to_give(spec, reason):
    with pytest.raises(UserError, match=reason) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


def test_wildcards_go_into_folders(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    write_tar(tmp_path / "a" / "b" / "0.tar", {"0.png": png(0)})
    assert len(open_source(f"tar:{tmp_path}/**/*.tar")) == 1


def test_a_folder_of_shards_is_told(tmp_path):
    with pytest.raises(UserError, match=r"a folder; for all shards in it give 'tar:.*/\*.tar'"):
        open_source(f"tar:{tmp_path}")
