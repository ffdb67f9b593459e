"""Image cache: the same crops, nothing decoded twice, never a torn image, never a stopped run."""

import io
import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data import reduced
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.batch import Batch
from ssl_vit.data.cache import ImageCache, no_use
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.images import open_images
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.order import Order
from ssl_vit.data.reduced import views_of
from ssl_vit.data.sources import open_source
from tests.unit.data.test_loader import MadeUp

SPEC = ViewSpec((Crop((24, 24)), Crop((16, 12), scale=(0.05, 0.5), count=2)))
FORK = get_context("fork")


def pixels(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """Smooth colours, so that a JPEG of them is no noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "TIFF":
        tifffile.imwrite(stream, image)
    else:
        Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def with_holes(image: np.ndarray) -> np.ndarray:
    """Gray floats, of which some are missing."""
    values = image[..., 0].astype(np.float32)
    values[5:20, 8:30] = np.nan
    return values


FILES = {
    "PNG": (encoded(pixels(0), "PNG"), 3),
    "gray PNG": (encoded(pixels(1)[..., 0], "PNG"), 3),
    "PNG of 16 bits": (encoded(pixels(2)[..., 0].astype(np.uint16) * 200, "PNG"), 1),
    "JPEG": (encoded(pixels(3), "JPEG"), 3),
    "JPEG as gray": (encoded(pixels(4), "JPEG"), 1),
    "reduced JPEG": (encoded(pixels(5, 743, 1117), "JPEG"), 3),
    "TIFF with missing values": (encoded(with_holes(pixels(6)), "TIFF"), 1),
}


def folder(place: Path, count: int = 12) -> str:
    """A source of PNG and JPEG files, and one that is unreadable."""
    place.mkdir()
    for i in range(count):
        kind = "PNG" if i % 2 else "JPEG"
        (place / f"{i:02d}.{kind.lower()}").write_bytes(encoded(pixels(i), kind))
    (place / "zz.png").write_bytes(b"garbage")
    return f"flat:{place}"


def batches(spec: str, cache: ImageCache | None, workers: int = 0, steps: int = 4) -> list[Batch]:
    source = open_source(spec)
    images = TrainImages(source, SPEC, 3, seed=1, cache=cache)
    return list(train_batches(images, Order(len(source), 6, 1), 0, steps, workers, pin=False))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.bad == b.bad
        for name in ("crops", "boxes"):
            pairs = zip(getattr(a.views, name), getattr(b.views, name), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)
        assert torch.equal(a.views.keys, b.views.keys)


def stored(cache: ImageCache) -> list[Path]:
    """Files of images, complete ones and others."""
    return [path for path in cache.folder.rglob("*") if path.is_file()]


@pytest.fixture
def cache(tmp_path) -> ImageCache:
    made = ImageCache(str(tmp_path / "cache"), reserve=0.0)
    made.prepare()
    return made


@pytest.mark.parametrize("kind", FILES)
def test_crops_have_the_same_bits_and_are_decoded_once(cache, kind, monkeypatch):
    raw, channels = FILES[kind]

    def crops(key: int, cache: ImageCache | None = None) -> list[torch.Tensor]:
        made = views_of(raw, channels, SPEC, key, cache=cache)
        return [crop.crop for kind in made for crop in kind]

    keys = range(8)
    plain, filling = [[crops(key, c) for key in keys] for c in (None, cache)]
    shapes = {tuple(f.stat().st_size for f in stored(cache))}

    def never(*args: object) -> None:
        raise AssertionError("was decoded again")

    monkeypatch.setattr(reduced, "decode", never)
    monkeypatch.setattr(reduced, "decode_reduced", never)
    reading = [crops(key, cache) for key in keys]
    for expected, *others in zip(plain, filling, reading, strict=True):
        for made in others:
            for a, b in zip(expected, made, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
    assert shapes == {tuple(f.stat().st_size for f in stored(cache))}
    assert (len(stored(cache)) > 1) == (kind == "reduced JPEG")


def test_batches_are_the_same_at_any_number_of_workers(cache, tmp_path):
    spec = folder(tmp_path / "images")
    plain = batches(spec, None)
    assert_same(batches(spec, cache, workers=2), plain)
    count = len(stored(cache))
    assert count == 12  # not the unreadable one
    assert_same(batches(spec, cache, workers=0), plain)
    assert len(stored(cache)) == count


def test_whoever_only_reads_writes_nothing(cache, tmp_path):
    spec = folder(tmp_path / "images")
    assert_same(batches(spec, cache.read_only()), batches(spec, None))
    assert stored(cache) == []


def test_what_is_decoded_otherwise_is_another_image(cache):
    raw = encoded(pixels(0), "PNG")
    for channels, reading in ((3, ReadConfig()), (1, ReadConfig()), (3, ReadConfig(nodata="9"))):
        views = [views_of(raw, channels, SPEC, 0, reading, c)[0][0].crop for c in (cache, None)]
        assert torch.equal(*(v.nan_to_num(-1.0) for v in views))
    assert len(stored(cache)) == 3


# Options of ReadConfig with a value that changes pixels, and those by which images are found.
DECODING = {"nodata": "9", "slices": "0", "window": ("40", "400"), "bands": (2, 1)}
DECODING |= {"values": "scaled", "tile": (64,), "level": 1}
NAMING = {"key", "image", "labels", "label_column", "group"}
NAMING |= {"shard_cache", "shard_cache_size", "cache_reserve"}


def test_every_option_of_reading_is_known_to_the_cache():
    """A new one decides pixels, or does not: with the first kind forgotten, old pixels are read."""
    assert {f.name for f in fields(ReadConfig)} == NAMING | DECODING.keys()
    kinds = [ReadConfig(), *(ReadConfig(**{name: v}) for name, v in DECODING.items())]
    assert len({reading.decoding for reading in kinds}) == len(kinds)


def test_a_dicom_in_another_window_is_another_image(cache):
    raw = Path(pytest.importorskip("pydicom").examples.get_path("ct")).read_bytes()
    seen = []
    for window in (("file",), ("full",), ("40", "400")):
        reading = ReadConfig(window=window)
        first, plain = (views_of(raw, 1, SPEC, 0, reading, c)[0][0].crop for c in (cache, None))
        assert torch.equal(first, plain)
        seen.append(first)
    assert len(stored(cache)) == 3
    assert not torch.equal(seen[1], seen[2])


def test_a_changed_image_is_another_one(cache, tmp_path):
    spec = folder(tmp_path / "images")
    before = batches(spec, cache)
    file = tmp_path / "images" / "01.png"
    size = file.stat()
    file.write_bytes(encoded(255 - pixels(1), "PNG"))
    os.utime(file, (size.st_atime, size.st_mtime))
    after = batches(spec, cache)
    assert_same(after, batches(spec, None))
    changed = [
        not torch.equal(a.views.crops[0], b.views.crops[0])
        for a, b in zip(before, after, strict=True)
    ]
    assert any(changed)


def in_processes(*jobs: Callable[[], object]) -> list[int | None]:
    """Exit statuses of these functions, at the same time in processes of their own."""
    processes = [FORK.Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_two_processes_fill_it_at_once(cache):
    raws = [encoded(pixels(i), "PNG") for i in range(40)]

    def fill() -> None:
        for raw in raws:
            image = cache.image(raw, "", lambda raw=raw: decode(raw, 3))
            assert torch.equal(image, decode(raw, 3))
        assert not cache.stopped

    assert in_processes(fill, fill) == [0, 0]
    assert len(stored(cache)) == len(raws)
    for raw in raws:
        assert torch.equal(cache.image(raw, "", lambda: None), decode(raw, 3))


def test_a_killed_writer_leaves_no_torn_image(cache):
    image = torch.arange(3 * 1500 * 1500).view(3, 1500, 1500).to(torch.uint8)

    def write_for_ever() -> None:
        for i in range(1 << 30):
            cache.image(b"%d" % i, "", lambda: image)

    for attempt in range(6):
        process = FORK.Process(target=write_for_ever)
        process.start()
        time.sleep(0.02 + 0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
    whole = [file for file in stored(cache) if file.parent.name != "partial"]
    assert whole
    for i in range(len(whole)):  # each process began with the first one, that it found
        assert torch.equal(cache.image(b"%d" % i, "", lambda: None), image)


def test_what_killed_writers_left_is_removed_later(cache):
    new, old = (cache.folder / "partial" / name for name in ("new", "old"))
    for file in (new, old):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.prepare()
    assert new.exists()
    assert not old.exists()


@pytest.mark.parametrize("left", [0, 10, 32, 6000])
def test_a_short_file_is_decoded_anew_and_replaced(cache, left):
    raw = encoded(pixels(0), "PNG")
    image = decode(raw, 3)
    assert torch.equal(cache.image(raw, "", lambda: image), image)
    (file,) = stored(cache)
    os.truncate(file, left)
    assert torch.equal(cache.image(raw, "", lambda: image), image)
    assert torch.equal(cache.image(raw, "", lambda: None), image)


def test_unreadable_images_are_not_kept(cache):
    with pytest.raises(BadImage):
        views_of(b"garbage", 3, SPEC, 0, cache=cache)
    assert stored(cache) == []


def test_too_little_room_is_said_once_and_stops_nothing(tmp_path, caplog):
    spec = folder(tmp_path / "images")
    cache = ImageCache(str(tmp_path / "cache"), reserve=1e18)
    assert_same(batches(spec, cache, workers=2), batches(spec, None))
    assert stored(cache) == []
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith(f"--data.cache {tmp_path / 'cache'} takes no more images (")
    assert "1,000,000,000 GB stay so: --data.cache-reserve" in said[0]


def test_a_failing_write_leaves_nothing_and_stops_nothing(cache):
    raw, large = encoded(pixels(0), "PNG"), encoded(pixels(0, 100, 100), "PNG")

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for data in (raw, large, encoded(pixels(9), "PNG")):
            image = decode(data, 3)
            assert torch.equal(cache.image(data, "", lambda image=image: image), image)
        assert "(File too large)" in cache.stopped

    assert in_processes(fill) == [0]
    (file,) = stored(cache)
    assert file.stat().st_size == 32 + 3 * 40 * 56


def test_a_folder_removed_meanwhile_stops_nothing(cache):
    for path in (cache.folder / "partial", cache.folder):
        path.rmdir()
    image = decode(encoded(pixels(0), "PNG"), 3)
    assert torch.equal(cache.image(b"0", "", lambda: image), image)
    assert "(No such file or directory)" in cache.stopped


def opened(spec: str, cache: Path, **options: float):
    return open_images(DataConfig(train=spec, holdout=0, cache=str(cache), **options), 0)


def test_a_run_is_told_what_it_takes_and_nothing_is_written_before(tmp_path):
    spec, place = folder(tmp_path / "images"), tmp_path / "new" / "cache"
    images = opened(spec, place, cache_reserve=2.0)
    assert images.cache is not None
    label, text = images.about()[-1]
    assert label == "cache"
    assert text.startswith(f"{place}: 13 decoded images take about 0.0874 MB; ")
    assert text.endswith(" GB are free there, 2.0 GB stay so")
    assert not place.parent.exists()


def test_arrays_need_no_cache(tmp_path):
    needless = "the images of %s are arrays, which need no decoding"
    assert no_use(MadeUp(2)) == needless % "made up"
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "0.npy", pixels(0))
    spec = f"flat:{tmp_path / 'arrays'}"
    images = opened(spec, tmp_path / "cache")
    assert images.cache is None
    assert images.warnings == (f"--data.cache has no effect: {needless % spec}",)


def test_planes_are_not_kept_and_that_is_said(tmp_path):
    (tmp_path / "stacks").mkdir()
    tifffile.imwrite(tmp_path / "stacks" / "0.tif", np.zeros((5, 8, 8), np.uint8))
    source = open_source(f"flat:{tmp_path / 'stacks'}", ReadConfig(slices="all"), channels=1)
    assert len(source) == 5
    reason = "parts of files (--data.slices all, --data.tile, --data.level) are not kept"
    assert no_use(source) == reason


def test_no_folder_is_refused_before_images_are_read(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below"):
        with pytest.raises(UserError, match=f"^--data.cache is '{place}': {file} is no folder; "):
            opened("flat:/nowhere", place)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    long = ImageCache(str(tmp_path / ("a" * 300)), reserve=0.0)
    with pytest.raises(UserError, match=r"^--data\.cache is '.*File name too long; give a folder"):
        long.prepare()
