"""Which images a source has: the same wherever they are, others when any of them is another."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_vit.common.reading import DataConfig
from ssl_vit.data import fingerprint as module
from ssl_vit.data.base import Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.fingerprint import fingerprint, sample
from ssl_vit.data.images import open_images
from ssl_vit.data.sources import open_source


def pictures(folder: Path, count: int = 12) -> Path:
    """Uncompressed pictures, all of one size, in two classes."""
    for i in range(count):
        place = folder / "ab"[i % 2] / f"{i:03d}.bmp"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place)
    return folder


def shards(folder: Path, change: int = -1) -> str:
    """Two shards of six pictures."""
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"s-{part}.tar", "w") as archive:
            for i in range(6):
                member = tarfile.TarInfo(f"{6 * part + i:03d}.npy")
                file = io.BytesIO()
                np.save(file, np.full((4, 4), i + 100 * (6 * part + i == change), dtype=np.uint8))
                member.size = file.tell()
                archive.addfile(member, io.BytesIO(file.getvalue()))
    return f"tar:{folder}/s-{{0..1}}.tar"


def of(spec: str) -> str:
    return fingerprint(open_source(spec))


def test_the_same_images_in_another_place(tmp_path):
    """Folders, with classes or without, and shards."""
    pictures(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert of(f"folder:{tmp_path}/one") == of(f"folder:{tmp_path}/two")
    assert of(f"flat:{tmp_path}/one") == of(f"flat:{tmp_path}/two")
    assert of(shards(tmp_path / "s")) == of(shards(tmp_path / "t"))
    assert of("digits:train") == of("digits:train") != of("digits:val")


def other_content(folder: Path) -> None:
    image = np.asarray(Image.open(folder / "a/004.bmp")).copy()
    image[0, 0] += 1
    Image.fromarray(image).save(folder / "a/004.bmp")


@pytest.mark.parametrize(
    "change",
    [
        other_content,
        lambda folder: (folder / "a/004.bmp").unlink(),
        lambda folder: (folder / "a/004.bmp").rename(folder / "a/100.bmp"),
        lambda folder: (folder / "a/004.bmp").rename(folder / "a/0040.bmp"),
        lambda folder: (folder / "a/004.bmp").rename(folder / "b/004.bmp"),
        lambda folder: shutil.copy(folder / "a/004.bmp", folder / "a/100.bmp"),
        lambda folder: (folder / "a/004.bmp").write_bytes(b""),
    ],
)
def test_a_change_of_one_file_is_noticed(tmp_path, change):
    folder = pictures(tmp_path / "one")
    before = of(f"folder:{folder}")
    change(folder)
    assert of(f"folder:{folder}") != before


def test_a_change_of_one_sample_of_a_shard_is_noticed(tmp_path):
    """Key and size are as before."""
    assert of(shards(tmp_path / "s")) != of(shards(tmp_path / "t", change=7))


def test_of_many_files_sizes_are_compared_beyond_those_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_READ", 2)
    folder = pictures(tmp_path / "one")
    read, source = sample(12, 2), open_source(f"folder:{folder}")
    before = fingerprint(source)
    unread = next(i for i in range(12) if i not in read)
    with open(source.name(unread), "ab") as file:
        file.write(b"more")
    assert of(f"folder:{folder}") != before


def test_files_that_cannot_be_read_fail_nothing(tmp_path):
    """A broken link, and a shard that has gone; both are as they are wherever they are."""
    for place in ("one", "two"):
        pictures(tmp_path / place)
        (tmp_path / place / "a/100.bmp").symlink_to("nowhere.bmp")
    assert of(f"folder:{tmp_path}/one") == of(f"folder:{tmp_path}/two")
    sources = [open_source(shards(tmp_path / name)) for name in "st"]
    for name in "st":
        (tmp_path / name / "s-1.tar").unlink()
    assert fingerprint(sources[0]) == fingerprint(sources[1])


class Arrays(Source):
    """A source that knows no names, as those of libraries."""

    spec = "arrays"

    def __init__(self, arrays: list[np.ndarray], bad: tuple[int, ...] = ()) -> None:
        self.arrays, self.bad, self.reads = arrays, bad, 0

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, i: int) -> tuple[np.ndarray, None]:
        self.reads += 1
        if i in self.bad:
            raise BadImage(f"/some/where/{id(self)} is damaged")
        return self.arrays[i], None

    def name(self, i: int) -> str:
        return f"arrays[{i}]"


def test_sources_without_names_are_told_by_content():
    arrays = [np.full((2, 3), i, dtype=np.uint8) for i in range(40)]
    same = fingerprint(Arrays(arrays))
    assert fingerprint(Arrays([a.copy() for a in arrays])) == same
    assert fingerprint(Arrays(arrays[::-1])) != same
    assert fingerprint(Arrays(arrays[:-1])) != same
    assert fingerprint(Arrays([*arrays[:-1], arrays[-1].T])) != same
    assert fingerprint(Arrays([a.astype(np.int16) for a in arrays])) != same
    assert fingerprint(Arrays(arrays, bad=(3,))) == fingerprint(Arrays(arrays, bad=(3,))) != same


def test_a_large_source_costs_some_hundred_reads():
    source = Arrays([np.zeros((1, 1), dtype=np.uint8)] * 5000)
    fingerprint(source)
    assert source.reads == 256
    chosen = sample(10**9, 256)
    assert len(set(chosen)) == 256
    assert max(chosen) > 9 * 10**8


def test_of_a_run(tmp_path):
    """By option; held-out images have an entry where an option names them. Computed once."""
    pictures(tmp_path / "one", 40)
    spec = f"flat:{tmp_path}/one"
    plain = open_images(DataConfig(train=spec), 0)
    found = plain.fingerprint
    assert found["count"] == 36
    assert found["content"] == {"data.train": of(spec)}
    both = open_images(DataConfig(train=spec, val="digits"), 0).fingerprint["content"]
    assert both == {"data.train": of(spec), "data.val": of("digits")}
    os.rename(tmp_path / "one", tmp_path / "two")
    assert plain.fingerprint is found
