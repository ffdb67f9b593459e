"""Feature files: parts on the disk, and each format as other libraries open it."""

import csv
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ssl_vit.common.errors import UserError
from ssl_vit.data.base import Source
from ssl_vit.evaluators import feature_files, feature_parts, options
from ssl_vit.evaluators.feature_files import FeatureTable, read_card, write_features
from ssl_vit.evaluators.feature_parts import Batches, Layout, Parts, Rows

SHAPES = {"cls": (4,), "patches": (6, 4)}


class Named(Source):
    """Images by name alone."""

    spec = "named"

    def __init__(self, n: int, width: int = 8) -> None:
        self.n, self.width = n, width

    def __len__(self) -> int:
        return self.n

    def name(self, i: int) -> str:
        return f"{i:0{self.width}d}.png"


def features(images: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """What these images have: their numbers, and more."""
    own = torch.arange(float(np.prod(shape))).reshape(shape) / 100
    return torch.tensor(images).view(-1, *(1 for _ in shape)) + own


def fill(parts: Parts, bad: tuple[int, ...] = ()) -> None:
    """Write all parts, as for a source of which some images are unreadable."""
    layout = parts.layout
    for part in range(layout.parts):
        made = []
        for batch in layout.batches(part):
            kept = [i for i in batch if i not in bad]
            rows = {name: features(kept, shape) for name, shape in layout.shapes.items() if kept}
            reasons = {i: f"{i:08d}.png: is broken" for i in batch if i in bad}
            made.append(Rows(rows, torch.tensor(kept).long(), reasons))
        parts.write(part, made)


@pytest.fixture
def table(tmp_path: Path) -> FeatureTable:
    """11 images in parts of 3, of which three cannot be read: a whole part of two, and another."""
    (tmp_path / "parts").mkdir()
    parts = Parts(tmp_path / "parts", Layout(11, 3, SHAPES))
    fill(parts, bad=(4, 9, 10))
    source = Named(11)
    source.classes = ("cat", "dög")
    source.labels = np.array([0, 1, -1, 0, 1, 0, 1, 0, 1, 0, 1])
    return FeatureTable(source, parts, {"made": "so"})


KEPT = [0, 1, 2, 3, 5, 6, 7, 8]
WANTED = {name: features(KEPT, shape).numpy() for name, shape in SHAPES.items()}
NAMES = [f"{i:08d}.png" for i in KEPT]


@pytest.mark.parametrize("batch", [1, 3, 32, 100, 5000])
@pytest.mark.parametrize("images", [1, 99, 7777, 200_000])
def test_every_image_is_in_one_batch_of_one_part(images: int, batch: int) -> None:
    layout = Layout(images, batch, {"mean": (384,)})
    flat = [i for indices in Batches(layout, range(layout.parts)) for i in indices]
    assert flat == list(range(images))
    assert all(len(b) == batch for part in range(layout.parts - 1) for b in layout.batches(part))
    assert batch <= layout.part_size <= max(batch, 2048)


def test_a_part_of_many_patches_is_small() -> None:
    layout = Layout(10_000_000, 16, {"patches": (784, 1024)})
    assert layout.part_size == 16
    assert layout.row_bytes == 4 * 784 * 1024


def test_a_part_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(tmp_path, Layout(6, 2, {"cls": (4,)}))
    fill(parts)
    assert parts.there() == [0, 1, 2]
    real = feature_parts.save_file

    def half(tensors: object, path: Path, metadata: object) -> None:
        real(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:50])
        raise OSError("the disk is full")

    monkeypatch.setattr(feature_parts, "save_file", half)
    parts.begin({"a": 1})
    assert parts.there() == []
    with pytest.raises(OSError, match="full"):
        fill(parts)
    assert parts.there() == []
    assert parts.card() == {"a": 1}


def test_parts_of_another_layout_are_none(tmp_path: Path) -> None:
    fill(Parts(tmp_path, Layout(12, 2, {"cls": (4,)})))
    assert Parts(tmp_path, Layout(12, 3, {"cls": (4,)})).there() == []


def test_numpy_and_scikit_learn_open_a_npz_file(table: FeatureTable, tmp_path: Path) -> None:
    write_features(tmp_path / "x.npz", table)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as f:
        assert list(f) == ["names", "labels", "classes", "cls", "patches", "card"]
        assert f["names"].tolist() == NAMES
        assert f["labels"].tolist() == [0, 1, -1, 0, 0, 1, 0, 1]
        assert f["classes"].tolist() == ["cat", "dög"]
        for name, wanted in WANTED.items():
            assert f[name].dtype == np.float32
            np.testing.assert_array_equal(f[name], wanted)
        card = json.loads(str(f["card"]))
        known = f["labels"] >= 0
        fitted = LogisticRegression().fit(f["cls"][known], f["labels"][known])
        assert fitted.predict(f["cls"]).shape == (8,)
    assert card["made"] == "so"
    assert card["rows"] == 8
    assert card["unreadable"] == [f"{i:08d}.png: is broken" for i in (4, 9, 10)]


def test_pandas_and_pyarrow_open_a_parquet_file(table: FeatureTable, tmp_path: Path) -> None:
    write_features(tmp_path / "x.parquet", table)
    frame = pandas.read_parquet(tmp_path / "x.parquet")
    assert list(frame) == ["name", "label", "class", "cls", "patches"]
    assert frame["name"].tolist() == NAMES
    assert frame["label"].tolist()[:2] == [0, 1]
    assert frame["label"].isna().tolist() == frame["class"].isna().tolist()
    assert frame["label"].isna().tolist() == [False, False, True] + 5 * [False]
    assert frame["class"].dropna().tolist() == ["cat", "dög", "cat", "cat", "dög", "cat", "dög"]
    np.testing.assert_array_equal(np.stack(frame["cls"]), WANTED["cls"])
    opened = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert str(opened.schema.field("patches").type) == "fixed_size_list<element: float>[24]"
    patches = opened["patches"].combine_chunks().flatten().to_numpy().reshape(-1, 6, 4)
    np.testing.assert_array_equal(patches, WANTED["patches"])
    assert json.loads(opened.schema.metadata[b"ssl_vit"])["rows"] == 8


def test_a_npy_file_has_names_and_card_beside_it(table: FeatureTable, tmp_path: Path) -> None:
    only = {"patches": SHAPES["patches"]}
    table = FeatureTable(table.source, Parts(table.parts.folder, Layout(11, 3, only)), table.card)
    write_features(tmp_path / "x.npy", table)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(mapped, WANTED["patches"])
    rows = list(csv.DictReader((tmp_path / "x.npy.csv").open()))
    assert [row["name"] for row in rows] == NAMES
    assert [row["class"] for row in rows[:4]] == ["cat", "dög", "", "cat"]
    assert [row["label"] for row in rows[:4]] == ["0", "1", "", "0"]
    assert json.loads((tmp_path / "x.npy.json").read_text())["rows"] == 8


def test_an_array_is_never_beside_the_names_of_another(
    table: FeatureTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = Parts(table.parts.folder, Layout(11, 3, {"cls": (4,)}))
    table = FeatureTable(table.source, only, table.card)
    write_features(tmp_path / "x.npy", table)
    monkeypatch.setattr(feature_files, "_write_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_features(tmp_path / "x.npy", table)
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".npy"])
def test_several_labels_or_none(suffix: str, table: FeatureTable, tmp_path: Path) -> None:
    only = Parts(table.parts.folder, Layout(11, 3, {"cls": (4,)}))
    several, none = Named(11), Named(11)
    several.classes, several.targets = ("a", "b"), np.zeros((11, 2), dtype=np.float32)
    several.targets[1] = [1, np.nan]
    for kind, source in (("several", several), ("none", none)):
        out = tmp_path / f"{kind}{suffix}"
        write_features(out, FeatureTable(source, only, {}))
        found = read_card(out)
        assert found is not None
        assert found["rows"] == 8
    if suffix == ".npz":
        labels = np.load(tmp_path / "several.npz")["labels"]
        np.testing.assert_array_equal(labels[:2], [[0, 0], [1, np.nan]])
        assert list(np.load(tmp_path / "none.npz")) == ["names", "cls", "card"]
    elif suffix == ".parquet":
        frame = pandas.read_parquet(tmp_path / "several.parquet")
        np.testing.assert_array_equal(np.stack(frame["labels"])[1], [1, np.nan])
        assert list(pandas.read_parquet(tmp_path / "none.parquet")) == ["name", "cls"]
    else:
        lines = (tmp_path / "several.npy.csv").read_text().splitlines()
        assert lines[:3] == ["name,a,b", "00000000.png,0,0", "00000001.png,1,"]
        assert (tmp_path / "none.npy.csv").read_text().startswith("name\n00000000.png\n")


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".npy"])
def test_names_that_are_no_unicode_are_kept_as_escapes(suffix: str, tmp_path: Path) -> None:
    source = Named(1)
    source.name = lambda i: b"caf\xe9,\n.png".decode(errors="surrogateescape")  # type: ignore
    (tmp_path / "parts").mkdir()
    parts = Parts(tmp_path / "parts", Layout(1, 1, {"cls": (4,)}))
    fill(parts)
    out, wanted = tmp_path / f"x{suffix}", "caf\\udce9,\n.png"
    write_features(out, FeatureTable(source, parts, {}))
    if suffix == ".npz":
        assert np.load(out)["names"].tolist() == [wanted]
    elif suffix == ".parquet":
        assert pandas.read_parquet(out)["name"].tolist() == [wanted]
    else:
        rows = list(csv.DictReader((tmp_path / "x.npy.csv").open(newline="")))
        assert [row["name"] for row in rows] == [wanted]


def test_other_files_have_no_card(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    np.save(tmp_path / "b.npy", np.ones(3))
    (tmp_path / "c.npz").write_bytes(b"no zip")
    pandas.DataFrame({"a": [1]}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"")
    np.save(tmp_path / "f", np.ones(3))
    (tmp_path / "f.npy").rename(tmp_path / "f.npz")
    assert [read_card(path) for path in sorted(tmp_path.iterdir())] == [None] * 6


def test_without_pyarrow_a_parquet_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'ssl_vit\[parquet\]'"):
        options.check_format("x.parquet")
    options.check_format("x.npz")


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".npy"])
def test_memory_does_not_grow_with_the_images(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of 2,000 characters: all of those of the longer source would take 4 MB, and 16 MB as
    numpy has them."""
    monkeypatch.setattr(feature_parts, "_IMAGES", 64)
    write_features(tmp_path / f"first{suffix}", filled(tmp_path / "first", 70))  # imports
    peaks = []
    for n in (250, 2000):
        tracemalloc.start()
        write_features(tmp_path / f"{n}{suffix}", filled(tmp_path / str(n), n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 500_000
    assert peaks[1] < 3_000_000


def filled(folder: Path, n: int) -> FeatureTable:
    """Parts of n images with long names."""
    folder.mkdir()
    parts = Parts(folder, Layout(n, 64, {"cls": (4,)}))
    fill(parts)
    return FeatureTable(Named(n, width=2000), parts, {})
