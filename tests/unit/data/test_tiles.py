"""Tiles of large images as images of their own: values, names, splits, what is said, memory."""

import logging
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from PIL import Image
from rasterio.windows import Window
from torch.utils.data import DataLoader

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.bad_images import BadImages
from ssl_vit.data.base import Source
from ssl_vit.data.cache import ImageCache, no_use
from ssl_vit.data.decode import BadImage, Decoded, decode
from ssl_vit.data.eval_images import EvalImages
from ssl_vit.data.fingerprint import fingerprint
from ssl_vit.data.images import open_images
from ssl_vit.data.loader import TrainImages
from ssl_vit.data.pairs import open_pairs
from ssl_vit.data.raster import EmptyTile
from ssl_vit.data.sources import open_source, split_holdout
from ssl_vit.data.tiles import Tiles
from tests.conftest import ROOT
from tests.unit.data.test_slices import Read, bytes_of, named
from tests.unit.data.test_tiff import gdal, numbers, tiff

TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "DEFLATE"}
BIG = os.environ.get("SSL_VIT_BIG_RASTER")


def opened(spec: str, channels: int, **reading) -> Source:
    return open_source(spec, ReadConfig(**reading), channels)


def values(source: Source, i: int, channels: int) -> np.ndarray:
    """(H, W, C), as decoded."""
    return decode(source.read(i)[0], channels, source.reading).numpy().transpose(1, 2, 0)


def scene(path: Path, height: int, width: int, bands: int = 4, **options) -> None:
    """A GeoTIFF of 16 bits whose values say where they are, written in strips of rows."""
    shape = {"height": height, "width": width, "count": bands, "dtype": "uint16"}
    with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
        step = 512
        for top in range(0, height, step):
            rows = min(step, height - top)
            y, x = np.ogrid[top : top + rows, :width]
            one = (y // 8 * 7 + x // 8 * 3 + 1).astype(np.uint16)
            block = np.stack([one + np.uint16(1000 * band) for band in range(bands)])
            file.write(block, window=Window(0, top, width, rows))


def equal_to_rasterio(source: Source, path: Path, which: list[int], bands: tuple[int, ...]) -> None:
    with rasterio.open(path) as file:
        for i in which:
            box = source.box(i)
            window = Window(box.left, box.top, box.width, box.height)
            expected = file.read(bands, window=window).transpose(1, 2, 0)
            found = values(source, i, len(bands))
            np.testing.assert_array_equal(found, expected.astype(np.float32) / np.float32(65535))


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {**TILED, "interleave": "pixel"},
        {**TILED, "interleave": "band"},
        {"compress": "LZW", "predictor": 2, "interleave": "pixel"},
        {"interleave": "band"},
        {},
    ],
    ids=["pixel", "band", "strips", "band rows", "rows"],
)
def test_tiles_are_the_windows_of_rasterio(tmp_path, options):
    scene(tmp_path / "a.tif", 300, 450, **options)
    for bands in ((1, 2, 3, 4), (4, 2)):
        source = opened(f"flat:{tmp_path}", len(bands), tile=(100, 128), bands=bands)
        assert len(source) == 3 * 4
        equal_to_rasterio(source, tmp_path / "a.tif", list(range(12)), bands)


def test_a_large_raster(tmp_path):
    """20,000 pixels a side with SSL_VIT_BIG_RASTER=1, in a quarter of a minute."""
    side = 20_000 if BIG else 2_000
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "ZSTD"}
    scene(tmp_path / "a.tif", side, side, **tiles)
    source = opened(f"flat:{tmp_path}", 4, tile=(256,))
    rows = -(-side // 256)
    assert len(source) == rows**2
    which = np.random.default_rng(0).integers(0, rows**2, 20).tolist()
    equal_to_rasterio(source, tmp_path / "a.tif", [0, rows - 1, rows**2 - 1, *which], (1, 2, 3, 4))


@pytest.mark.parametrize("size", [(100, 130), (64, 64), (63, 64), (65, 20), (20, 200)])
def test_the_grid_covers_an_image_and_ends_where_it_does(tmp_path, size):
    """Tiles do not overlap but at the last row and column, and all have one size."""
    np.save(tmp_path / "a.npy", bytes_of(*size, 3))
    source = opened(f"flat:{tmp_path}", 3, tile=(64,))
    seen = np.zeros(size, int)
    for i in range(len(source)):
        tile = values(source, i, 3)
        assert tile.shape == (min(size[0], 64), min(size[1], 64), 3)
        if isinstance(source, Tiles):
            box = source.box(i)
            seen[box.top : box.top + box.height, box.left : box.left + box.width] += 1
    assert len(source) == -(-size[0] // 64) * -(-size[1] // 64)
    assert seen.min() == 1
    assert (seen[: size[0] // 64 * 64 - 64, : size[1] // 64 * 64 - 64] == 1).all()


def test_every_format_is_cut_as_its_whole_is_read(tmp_path):
    rgb = bytes_of(100, 150, 3)
    image = Image.fromarray(rgb)
    for kind in ("png", "bmp", "webp", "jpg", "ppm", "jp2"):
        image.save(tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {}))
    np.save(tmp_path / "b.npy", rgb)
    np.save(tmp_path / "c.npy", np.asfortranarray(rgb.transpose(2, 0, 1)))
    image.convert("YCbCr").save(tmp_path / "d.tif")
    (tmp_path / "e.tif").write_bytes(tiff(rgb, photometric="rgb", compression="zstd"))
    for bands in ((), (3, 1, 2)):
        whole = opened(f"flat:{tmp_path}", 3, bands=bands)
        source = opened(f"flat:{tmp_path}", 3, bands=bands, tile=(64, 96))
        assert len(source) == 4 * len(whole) == 40
        for file in range(len(whole)):
            pixels = values(whole, file, 3)
            for i in np.flatnonzero(source.file_of == file).tolist():
                top, left, height, width = source.box(i)
                expected = pixels[top : top + height, left : left + width]
                np.testing.assert_array_equal(values(source, i, 3), expected)


def test_dicom_is_cut(tmp_path):
    raw = Path(pytest.importorskip("pydicom").examples.get_path("ct")).read_bytes()
    (tmp_path / "a.dcm").write_bytes(raw)
    source = opened(f"flat:{tmp_path}", 1, tile=(100,))
    whole = decode(raw, 1).numpy().transpose(1, 2, 0)
    assert len(source) == 4
    np.testing.assert_array_equal(values(source, 3, 1), whole[-100:, -100:])


def test_small_images_are_the_files_themselves(tmp_path):
    Image.fromarray(bytes_of(64, 64, 3)).save(tmp_path / "a.png")
    Image.fromarray(bytes_of(65, 64, 3)).save(tmp_path / "b.png")
    source = opened(f"flat:{tmp_path}", 3, tile=(64,))
    names = [source.name(i).rpartition("/")[2] for i in range(len(source))]
    assert names == ["a.png", "b.png#r0c0", "b.png#r1c0"]
    assert source.read(0)[0] == (tmp_path / "a.png").read_bytes()
    assert isinstance(source.read(1)[0], Decoded)


def test_bad_files_are_one_bad_image_each(tmp_path, monkeypatch):
    (tmp_path / "a.tif").write_bytes(tiff(numbers("u1", (90, 90, 3)), photometric="rgb")[:300])
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    for module in ("extent", "raster"):  # as of an image that is too large to be decoded
        monkeypatch.setattr(f"ssl_vit.data.{module}.MAX_PIXELS", 80 * 80)
    Image.fromarray(bytes_of(90, 90, 3)).save(tmp_path / "c.png")
    source = opened(f"flat:{tmp_path}", 3, tile=(64,))
    assert len(source) == 3
    for i in range(3):
        with pytest.raises(BadImage):
            values(source, i, 3)


def test_files_without_a_header_are_told_and_limited_as_files(tmp_path, caplog):
    """Each is one image, where its neighbours are many: as images they would be too few."""
    for i in range(7):
        scene(tmp_path / f"{i}.tif", 160, 160, bands=3, **TILED)
    (tmp_path / "0.tif").write_bytes((tmp_path / "0.tif").read_bytes()[:50])
    source = opened(f"flat:{tmp_path}", 3, tile=(16,))
    assert len(source) == 1 + 6 * 100
    assert "1 of 7 files cannot be read; the first is " in caplog.text
    assert "6 of 7 files are stored in parts" in caplog.text
    assert "no larger" not in caplog.text
    with pytest.raises(UserError) as error:
        open_images(DataConfig(train=f"flat:{tmp_path}", tile=(16,)), seed=0)
    said = "1 of 7 files cannot be read, more than --data.max-bad 0.05 allows; the first is"
    assert f"{said} {tmp_path}/0.tif: " in str(error.value)
    images = open_images(DataConfig(train=f"flat:{tmp_path}", tile=(16,), max_bad=0.2), seed=0)
    assert len(images.train) == len(source)


# --- planes, levels, shards, workers -------------------------------------------------------------


def test_tiles_of_every_plane(tmp_path):
    stored = bytes_of(3, 100, 90)
    (tmp_path / "a.tif").write_bytes(named(stored, "ZYX"))
    np.save(tmp_path / "b.npy", np.repeat(stored[..., None], 3, -1))
    source = opened(f"flat:{tmp_path}", 3, tile=(64,), slices="all")
    assert len(source) == 2 * 3 * 4
    for i in range(len(source)):
        file, plane, row, column = source.place(i)
        end = "tif" if file == 0 else "npy"
        assert source.name(i).endswith(f".{end}[{plane}]#r{row}c{column}")
        box = source.box(i)
        part = stored[plane, box.top : box.top + 64, box.left : box.left + 64]
        np.testing.assert_array_equal(values(source, i, 3), np.repeat(part[..., None], 3, -1))
    middle = opened(f"flat:{tmp_path}", 3, tile=(64,))
    np.testing.assert_array_equal(values(middle, 0, 3)[..., 0], stored[1, :64, :64])
    last = opened(f"flat:{tmp_path}", 3, tile=(64,), slices="2")
    np.testing.assert_array_equal(values(last, 0, 3)[..., 0], stored[2, :64, :64])
    planes = opened(f"flat:{tmp_path}", 3, tile=(100,), slices="all")
    assert planes.name(4).endswith("b.npy[1]")
    np.testing.assert_array_equal(values(planes, 4, 3)[..., 0], stored[1])


def test_a_level_of_slides_whole_and_in_tiles(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ssl_vit")
    stored = numbers("u1", (280, 360, 3))
    options = {"photometric": "rgb", "tile": (32, 32), "compression": "zlib"}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        file.write(stored, subifds=2, metadata={"axes": "YXS"}, **options)
        for by in (2, 4):
            file.write(stored[::by, ::by], subfiletype=1, **options)
    for level in range(3):
        small = stored[:: 2**level, :: 2**level]
        source = opened(f"flat:{tmp_path}", 3, tile=(64,), level=level)
        assert len(source) == -(-small.shape[0] // 64) * -(-small.shape[1] // 64)
        for i in range(0, len(source), 5):
            top, left, height, width = source.box(i)
            expected = small[top : top + height, left : left + width]
            np.testing.assert_array_equal(values(source, i, 3), expected)
        whole = opened(f"flat:{tmp_path}", 3, level=level)
        assert len(whole) == 1
        np.testing.assert_array_equal(values(whole, 0, 3), small)
    assert "level 2 is 4 times smaller than the full size" in caplog.text
    lacks = opened(f"flat:{tmp_path}", 3, level=3, tile=(64,))
    with pytest.raises(BadImage, match=r"has 3 levels, from 0; --data\.level is 3"):
        lacks.read(0)
    with pytest.raises(UserError, match=r"none of 1 images .* has 3 levels, from 0"):
        open_images(DataConfig(train=f"flat:{tmp_path}", level=3), seed=0)


@pytest.fixture
def scenes(tmp_path) -> Path:
    """Two classes with six scenes each, of 4 or 6 tiles, and a small image."""
    for i in range(12):
        folder = tmp_path / "scenes" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        scene(folder / f"{i:02d}.tif", 100, 90 + 60 * (i % 3 == 0), bands=3, **TILED)
    Image.fromarray(bytes_of(20, 30, 3)).save(folder / "small.png")
    return tmp_path / "scenes"


def test_tiles_have_the_label_and_the_side_of_their_file(scenes):
    source = opened(f"folder:{scenes}", 3, tile=(64,))
    assert len(source) == 8 * 4 + 4 * 6 + 1
    assert source.classes == ("a", "b")
    for i in range(len(source)):
        assert source.labels[i] == source.read(i)[1] == "ab".index(source.name(i).split("/")[-2])
    train, held = split_holdout(source, 6, seed=1)
    assert len(train) + len(held) == len(source)
    assert len(held)
    assert not set(train.file_of) & set(held.file_of)
    kept, other = (opened(f"{part}:folder:{scenes}", 3, tile=(64,)) for part in ("kept", "held"))
    assert not set(kept.file_of) & set(other.file_of)
    other_tile = opened(f"folder:{scenes}", 3, tile=(65,))
    assert len(other_tile) == len(source)
    assert fingerprint(source) == fingerprint(opened(f"folder:{scenes}", 3, tile=(64,)))
    assert fingerprint(source) != fingerprint(other_tile)


def test_tiles_of_shards_and_of_workers(scenes, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for path in sorted(scenes.rglob("*.tif")):
            file.add(path, path.name)
    source = opened(f"tar:{tmp_path}/a.tar", 3, tile=(64,))
    folder = opened(f"flat:{scenes}", 3, tile=(64,))
    by_name = {folder.name(i).rpartition("/")[2].replace(".tif", ""): i for i in range(len(folder))}
    assert len(source) == len(folder) - 1
    here = [Read(source)[i] for i in range(len(source))]  # opens files that workers must not share
    for i, tile in enumerate(here):
        other = by_name[source.name(i).rpartition(":")[2]]
        assert torch.equal(tile, decode(folder.read(other)[0], 1))
    there = DataLoader(Read(source), batch_size=None, num_workers=2)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    there = DataLoader(Read(folder), batch_size=None, num_workers=2)
    expected = [Read(folder)[i] for i in range(len(folder))]
    assert all(torch.equal(a, b) for a, b in zip(expected, there, strict=True))


def test_few_files_are_open_at_a_time_and_what_was_decoded_of_others_is_let_go(scenes):
    source = opened(f"flat:{scenes}", 3, tile=(60,))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(len(source)):
        source.read(i)
    assert len(os.listdir("/proc/self/fd")) - before <= 8
    files, parts = source.open_files._mine()
    assert parts.kept
    there = {id(windows.plane.file) for windows, _ in files.kept.values()}
    assert {file for file, *_ in parts.kept} <= there


def test_a_forked_process_opens_its_own_files(scenes, monkeypatch):
    """They would share the position in a file with those of its parent."""
    source = opened(f"flat:{scenes}", 3, tile=(64,))
    source.read(0)
    before = source.open_files._mine()
    assert source.open_files._mine() is before
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert source.open_files._mine()[0] is not before[0]


def test_a_run_has_statistics_and_says_what_is_not_kept(scenes, tmp_path):
    options = DataConfig(train=f"folder:{scenes}", tile=(64,), cache=str(tmp_path / "cache"))
    images = open_images(options, seed=0)
    assert images.deep
    assert len(images.mean) == 3
    assert set(images.train.file_of).isdisjoint(images.val.file_of)
    why = "parts of files (--data.slices all, --data.tile, --data.level) are not kept"
    assert images.warnings == (f"--data.cache has no effect: {why}",)
    assert no_use(images.train) == why


def test_small_files_among_tiles_are_kept_in_the_cache(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(bytes_of(20, 30, 3)).save(tmp_path / "images/a.png")
    scene(tmp_path / "images/b.tif", 100, 90, bands=3)
    source = opened(f"flat:{tmp_path / 'images'}", 3, tile=(64,))
    cache = ImageCache(str(tmp_path / "cache"), reserve=0.0)
    cache.prepare()
    spec = ViewSpec((Crop((8, 8)),))
    pairs = [(0, i) for i in range(len(source))]
    seen = [TrainImages(source, spec, 3, 0, c).__getitems__(pairs) for c in (None, cache, cache)]
    assert all(torch.equal(seen[0].views.crops[0], batch.views.crops[0]) for batch in seen)
    assert len(list(cache.folder.rglob("*/*"))) == 1


# --- what is said --------------------------------------------------------------------------------


def test_what_is_cut_is_said_and_strips_are_a_warning(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ssl_vit")
    scene(tmp_path / "a.tif", 200, 1200, bands=1, compress="LZW")
    Image.fromarray(bytes_of(20, 30)).save(tmp_path / "b.png")
    opened(f"flat:{tmp_path}", 1, tile=(64,))
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].endswith("77 images: tiles of 64 x 64 px of 1 of 2 files; no larger: 1")
    assert "1 of 2 files are stored in parts of 3 x 1200 px, of which each tile" in texts[1]
    assert "decodes 19 times its own pixels: store them in tiles" in texts[1]


def test_arrays_are_not_cut_and_that_is_said(caplog):
    source = opened("digits", 1, tile=(4,))
    assert len(source) == 1797
    assert "--data.tile has no effect on arrays in memory" in caplog.text


def test_pairs_are_not_cut(tmp_path):
    with pytest.raises(UserError, match=r"^--data\.tile has no effect on pairs: leave it out"):
        open_pairs(f"pairs:{tmp_path}", ReadConfig(tile=(64,)))


@pytest.mark.parametrize("tile", [(0,), (1, 2, 3), (-4, 4)])
def test_tiles_of_no_size_are_refused(tile):
    with pytest.raises(UserError, match=r"--data\.tile is .*; allowed: one number above 0, or two"):
        ReadConfig(tile=tile)
    with pytest.raises(UserError, match=r"--data\.level is -1"):
        ReadConfig(level=-1)


# --- tiles without data --------------------------------------------------------------------------


def island(path: Path, side: int = 640, land: int = 64, nodata: int | None = 0) -> None:
    """A scene of which only the first corner has data."""
    stored = np.zeros((3, side, side), np.uint8)
    stored[:, :land, :land] = bytes_of(3, land, land) | 1
    path.write_bytes(gdal(stored, nodata=nodata, **TILED))


def test_tiles_without_data_are_replaced_and_counted_apart(tmp_path, caplog):
    island(tmp_path / "a.tif")
    source = opened(f"flat:{tmp_path}", 3, tile=(64,))
    assert len(source) == 100
    for i in (1, 99):
        with pytest.raises(EmptyTile, match="holds no data"):
            source.read(i)
    images = TrainImages(source, ViewSpec((Crop((8, 8)),)), 3, seed=0)
    batch = images.__getitems__([(0, i) for i in range(10)])
    assert not batch.bad
    assert set(range(1, 10)) <= batch.empty
    assert not batch.views.crops[0].isnan().any()
    again = images.__getitems__([(0, i) for i in range(10)])
    assert torch.equal(batch.views.crops[0], again.views.crops[0])
    caplog.set_level(logging.INFO, "ssl_vit")
    counter = BadImages(source, max_share=0.0)
    counter.note(batch)
    assert counter.news
    counter.count()
    assert f"{len(batch.empty)} of 100 images so far are tiles without data" in caplog.text
    counter.note(again)
    assert not counter.news
    seen = EvalImages(source, (8, 8), 1.0, 3).__getitems__(range(10))
    assert sorted(seen.bad) == list(range(1, 10))


def test_a_run_is_told_of_tiles_without_data(tmp_path):
    for i in range(4):
        island(tmp_path / f"{i}.tif", 256, 128)
    images = open_images(DataConfig(train=f"flat:{tmp_path}", tile=(64,), statistics="auto"), 0)
    rows = dict(images.about())
    assert rows["empty tiles"].startswith("48 of 64 images looked at are tiles without data")
    assert images.warnings == ()
    for i in range(4):
        island(tmp_path / f"{i}.tif", 256, 128, nodata=None)
    images = open_images(DataConfig(train=f"flat:{tmp_path}", tile=(64,), statistics="auto"), 0)
    assert images.warnings == (
        "48 of 64 images looked at have one value everywhere, as 0, and teach nothing; if 0 is no "
        "data, give --data.nodata 0",
    )


def test_a_source_without_any_data_is_one_line(tmp_path):
    island(tmp_path / "a.tif", land=0)
    with pytest.raises(UserError, match=r"none of 100 images .* holds no data"):
        open_images(DataConfig(train=f"flat:{tmp_path}", tile=(64,)), seed=0)
    source = opened(f"flat:{tmp_path}", 3, tile=(64,))
    with pytest.raises(UserError, match="500 tiles in a row hold no data"):
        TrainImages(source, ViewSpec((Crop((8, 8)),)), 3, seed=0).__getitems__([(0, 0)])


# --- time and memory -----------------------------------------------------------------------------


def test_a_hundred_thousand_tiles_are_listed_in_seconds(tmp_path):
    """From headers, into arrays: 48 bytes a tile."""
    shape = {"height": 81_000, "width": 81_000, "count": 1, "dtype": "uint8", "sparse_ok": True}
    tiles = {"tiled": True, "blockxsize": 1024, "blockysize": 1024, "nodata": 0}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", **shape, **tiles):
        pass
    begin = time.perf_counter()
    source = opened(f"flat:{tmp_path}", 1, tile=(256,))
    assert time.perf_counter() - begin < 5
    assert len(source) == 317**2
    held = [a for a in vars(source).values() if isinstance(a, np.ndarray)]
    assert sum(a.nbytes for a in held) < 10 * len(source)


MEMORY = """
import resource, sys
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.decode import decode
from ssl_vit.data.loader import TrainImages
from ssl_vit.data.sources import open_source
import imagecodecs, tifffile
import numpy as np
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
source = open_source("flat:" + sys.argv[1], ReadConfig(tile=(256,)), 4)
for i in np.random.default_rng(0).integers(0, len(source), int(sys.argv[2])):
    decode(source.read(int(i))[0], 4, source.reading)
print(peak() - before)
"""


def test_memory_of_reading_tiles(tmp_path):
    """Beyond what torch and the decoders take once imported."""
    side = 20_000 if BIG else 4_000
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "ZSTD"}
    scene(tmp_path / "a.tif", side, side, **tiles)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), "2000" if BIG else "100"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) < 100
