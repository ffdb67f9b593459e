"""Feature cache: keyed by content, recomputed whenever anything differs."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_vit.data.base import Source, Subset
from ssl_vit.data.decode import BadImage
from ssl_vit.data.sources import open_source
from ssl_vit.evaluators import cache
from ssl_vit.evaluators.cache import cached, content_sha256
from ssl_vit.evaluators.features import FeatureSet


class Bytes(Source):
    """Images as given; None is one that cannot be read."""

    def __init__(self, images: list[bytes | np.ndarray | None]) -> None:
        self.spec, self.images = "bytes", images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> tuple[bytes | np.ndarray, int | None]:
        image = self.images[i]
        if image is None:
            raise BadImage("gone")
        return image, None


def a_set(value: float = 1.0) -> FeatureSet:
    parts = {"cls": torch.full((3, 2), value), "mean": torch.zeros(3, 2)}
    return FeatureSet(parts, torch.tensor([0, 1, 1]), 2, torch.tensor([0, 2, 4]))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path))
    return tmp_path / "features"


def test_a_second_call_makes_nothing_and_gives_the_same() -> None:
    about = {"source": "x", "content": "1"}
    first = cached(about, a_set, write=True)
    again = cached(about, lambda: pytest.fail("made again"), write=True)
    assert again.parts.keys() == first.parts.keys()
    assert all(torch.equal(again.parts[k], first.parts[k]) for k in first.parts)
    assert torch.equal(again.labels, first.labels)
    assert torch.equal(again.index, first.index)
    assert again.unreadable == 2


@pytest.mark.parametrize("key", ["content", "weights", "precision"])
def test_whatever_differs_is_made_anew(key: str) -> None:
    about = {"source": "x", "content": "1", "weights": "a", "precision": "fp32"}
    cached(about, a_set, write=True)
    other = cached(about | {key: "other"}, lambda: a_set(5.0), write=True)
    assert other.parts["cls"][0, 0] == 5.0


def test_the_same_images_under_another_name_are_not_made_anew() -> None:
    cached({"source": "x", "content": "1"}, a_set, write=True)
    cached({"source": "y", "content": "1"}, lambda: pytest.fail("made again"), write=True)


def test_what_one_process_lacks_all_make() -> None:
    about = {"source": "x", "content": "1"}
    cached(about, a_set, write=True)
    made = cached(about, lambda: a_set(5.0), write=False, anywhere=lambda lacking: True)
    assert made.parts["cls"][0, 0] == 5.0


def test_labels_of_several_kinds_come_back(folder: Path) -> None:
    several = a_set()
    several.labels = torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [0.0, 0.0]])
    cached({"source": "x"}, lambda: several, write=True)
    back = cached({"source": "x"}, a_set, write=False)
    assert torch.equal(back.labels.isnan(), several.labels.isnan())
    assert back.labels.dtype == torch.float32


def test_only_the_writing_process_keeps_them(folder: Path) -> None:
    cached({"source": "x"}, a_set, write=False)
    assert not folder.exists()


def test_a_damaged_file_is_made_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached({"source": "x"}, a_set, write=True)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        again = cached({"source": "x"}, lambda: a_set(7.0), write=True)
    assert again.parts["cls"][0, 0] == 7.0
    assert "damaged" in caplog.text
    assert cached({"source": "x"}, a_set, write=True).parts["cls"][0, 0] == 7.0


def test_a_place_that_takes_no_file_costs_a_line_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "a-file"))
    with caplog.at_level(logging.WARNING):
        made = cached({"source": "x"}, a_set, write=True)
    assert made.parts["cls"][0, 0] == 1.0
    assert "not cached" in caplog.text


def test_the_oldest_files_go_when_there_are_too_many(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached({"source": "x", "content": "one"}, a_set, write=True)
    (first,) = folder.iterdir()
    monkeypatch.setattr(cache, "_LARGEST_CACHE", int(first.stat().st_size * 1.5))
    cached({"source": "x", "content": "two"}, a_set, write=True)
    left = list(folder.iterdir())
    assert len(left) == 1
    assert left != [first]


def test_content_is_what_is_in_the_images_not_their_names() -> None:
    one = Bytes([b"a", b"bc", np.arange(4, dtype=np.uint8)])
    same = Bytes([b"a", b"bc", np.arange(4, dtype=np.uint8)])
    same.spec = "elsewhere"
    assert content_sha256(one) == content_sha256(same)
    others = [
        Bytes([b"a", b"bd", np.arange(4, dtype=np.uint8)]),
        Bytes([b"ab", b"c", np.arange(4, dtype=np.uint8)]),
        Bytes([b"bc", b"a", np.arange(4, dtype=np.uint8)]),
        Bytes([b"a", b"bc", np.arange(4, dtype=np.uint8).reshape(2, 2)]),
        Bytes([b"a", None, np.arange(4, dtype=np.uint8)]),
        Bytes([b"a", b"bc"]),
    ]
    assert len({content_sha256(s) for s in [one, *others]}) == 7


def test_labels_are_part_of_the_content() -> None:
    digits = open_source("digits:val")
    other = Subset(digits, np.arange(len(digits)))
    assert content_sha256(digits) == content_sha256(other)
    other.labels = np.roll(digits.labels, 1)
    assert content_sha256(digits) != content_sha256(other)
