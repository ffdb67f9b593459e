"""Windows of TIFF files, and levels of pyramids: as the same part of the whole, and as by GDAL."""

import io

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
from rasterio.io import MemoryFile
from rasterio.windows import Window

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.raster import BadImage, Box
from ssl_vit.data.recent import Recent
from ssl_vit.data.tiff import Plane, open_tiff
from tests.unit.data.test_tiff import LOSSLESS, gdal, numbers, tiff

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 70, 90
BOXES = [
    *(Box(0, 0, HEIGHT, WIDTH), Box(0, 0, 1, 1), Box(HEIGHT - 1, WIDTH - 1, 1, 1)),
    *(Box(16, 32, 16, 32), Box(15, 31, 18, 34), Box(3, 0, 9, WIDTH), Box(40, 60, 30, 30)),
]


def plane(raw: bytes, channels: int, **reading) -> Plane:
    return Plane.of(open_tiff(io.BytesIO(raw)), channels, ReadConfig(**reading))


def same_windows(raw: bytes, channels: int, whole: np.ndarray | None = None, **reading) -> None:
    """Each window is the same part of the whole, with strips and tiles kept for others and without;
    read in any order."""
    own = plane(raw, channels, **reading)
    assert own.by_window
    full = own.read()
    pixels = full.pixels if whole is None else whole
    np.testing.assert_array_equal(full.pixels, pixels)
    recent: Recent[np.ndarray] = Recent(4, 1 << 14)
    for box in [*BOXES, *BOXES[::-1]]:
        part = np.s_[box.top : box.top + box.height, box.left : box.left + box.width]
        for kept in (None, recent):
            found = own.read(box, kept)
            np.testing.assert_array_equal(found.pixels, pixels[part], strict=True)
            lost = np.zeros_like(pixels, bool) if full.missing is None else full.missing
            seen = np.zeros(found.pixels.shape, bool) if found.missing is None else found.missing
            np.testing.assert_array_equal(seen, lost[part])


@pytest.mark.parametrize("tile", [None, (16, 32)], ids=["strips", "tiles"])
@pytest.mark.parametrize("codec", [None, "lzw", "zstd", "deflate", "jpeg2000", "jpegxl", "lerc"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_windows_in_every_layout(planar, codec, tile):
    for dtype, byteorder in (("u1", "<"), ("u2", ">"), ("f4", "<")):
        if dtype == "f4" and codec == "jpeg2000":
            continue
        if codec in LOSSLESS or codec == "lerc":  # which tifffile writes in this order only
            byteorder = "<"
        stored = numbers(dtype, (HEIGHT, WIDTH, 4))
        shown = stored if planar == "contig" else np.ascontiguousarray(stored.transpose(2, 0, 1))
        options = {"photometric": "minisblack", "planarconfig": planar, "byteorder": byteorder}
        options |= {"compression": codec, "tile": tile, **LOSSLESS.get(codec or "", {})}
        if tile is None:
            options["rowsperstrip"] = 8
        same_windows(tiff(shown, **options), 4, stored)


@pytest.mark.parametrize("rows", [1, 7, HEIGHT, 500])
@pytest.mark.parametrize("codec", [None, "zstd"])
def test_strips_of_any_height(rows, codec):
    stored = numbers("u2", (HEIGHT, WIDTH))
    raw = tiff(stored, photometric="minisblack", compression=codec, rowsperstrip=rows)
    same_windows(raw, 1, stored[..., None])


@pytest.mark.parametrize("options", [{"predictor": 2}, {"bigtiff": True}, {"predictor": 3}])
def test_predictors_and_large_files(options):
    stored = numbers("f4" if options.get("predictor") == 3 else "u2", (HEIGHT, WIDTH, 3))
    same_windows(tiff(stored, photometric="rgb", compression="zstd", **options), 3, stored)


def test_bits_jpeg_and_colours():
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    smooth = np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8)
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 16}
    bands = smooth.transpose(2, 0, 1)
    for options in (tiles, {}):
        same_windows(gdal(bands, compress="JPEG", photometric="YCBCR", **options), 3)
        same_windows(gdal(bands[:1] & 1, nbits=1, **options), 1)
        same_windows(gdal(bands[:1], photometric="MINISWHITE", **options), 1)
        same_windows(gdal(bands, interleave="band", compress="LZW", **options), 3, smooth)


def test_pages_that_are_channels_and_planes():
    stored = numbers("u1", (3, 2, HEIGHT, WIDTH))
    for axes, order in (("ZCYX", (0, 1)), ("CZYX", (1, 0))):
        buffer = io.BytesIO()
        shown = stored if axes == "ZCYX" else np.ascontiguousarray(stored.transpose(1, 0, 2, 3))
        options = {"photometric": "minisblack", "metadata": {"axes": axes}, "tile": (16, 32)}
        tifffile.imwrite(buffer, shown, ome=True, **options)
        for number in range(3):
            expected = shown.transpose(*order, 2, 3)[number].transpose(1, 2, 0)
            same_windows(buffer.getvalue(), 2, expected, slices=str(number))
            swapped = expected[..., ::-1]
            same_windows(buffer.getvalue(), 2, swapped, slices=str(number), bands=(2, 1))


@pytest.mark.parametrize("tile", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16}])
def test_masks_and_nodata_in_windows(tile):
    stored, mask = numbers("u1", (3, HEIGHT, WIDTH)), np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:10], mask[:, :7] = 0, 0
    raw = gdal(stored, mask=mask, compress="DEFLATE", **tile)
    same_windows(raw, 3)
    same_windows(raw, 2, bands=(3, 1))
    assert plane(raw, 3).read(Box(0, 0, 20, 20)).missing.sum() == 3 * (400 - 10 * 13)
    same_windows(gdal(stored, nodata=7, **tile), 3)
    assert plane(raw, 3, nodata="none").read(Box(0, 0, 20, 20)).missing is None


def test_parts_that_are_left_out_of_a_file():
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "sparse_ok": True}
    shape = {"height": 70, "width": 90, "count": 2, "dtype": "int16", "nodata": -9999}
    for interleave in ("pixel", "band"):
        with MemoryFile() as memory:
            with memory.open(driver="GTiff", interleave=interleave, **shape, **tiles) as file:
                file.write(np.full((2, 16, 16), 7, np.int16), window=Window(32, 16, 16, 16))
            raw = memory.read()
        same_windows(raw, 2)
        assert (plane(raw, 2).read(Box(15, 31, 18, 18)).pixels == 7).sum() == 2 * 256


def test_a_window_of_a_cut_file_is_bad():
    stored = numbers("u2", (HEIGHT, WIDTH, 3))
    for options in ({"tile": (16, 32), "compression": "zstd"}, {"compression": None}):
        raw = tiff(stored, photometric="rgb", **options)
        own = plane(raw, 3)
        own.file.filehandle._fh.truncate(len(raw) // 2)
        assert own.read(Box(0, 0, 8, 8)).pixels.shape == (8, 8, 3)
        with pytest.raises(BadImage, match="truncated TIFF"):
            own.read(Box(HEIGHT - 8, WIDTH - 8, 8, 8))


def test_a_part_is_decoded_once_for_windows_that_share_it(monkeypatch):
    own = plane(tiff(numbers("u1", (64, 64)), tile=(32, 32), compression="zstd"), 1)
    decoded, decode = [], own.page.decode

    def counted(data, index, **options):
        decoded.append(index)
        return decode(data, index, **options)

    monkeypatch.setattr(own.page, "decode", counted)
    recent: Recent[np.ndarray] = Recent(100, 1 << 20)
    for left in range(0, 64, 16):
        own.read(Box(0, left, 16, 16), recent)
    assert decoded == [0, 1]
    own.read(Box(32, 0, 32, 32), recent)  # no other window needs what is within one
    assert decoded == [0, 1, 2]
    assert recent.held == 2 * 32 * 32


# --- levels ------------------------------------------------------------------------------------


def pyramid(kind: str, stored: np.ndarray) -> bytes:
    """A slide of three levels, each half of the one before, with a thumbnail where there is one."""
    options = {"photometric": "rgb", "tile": (32, 32), "compression": "zlib"}
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=kind == "ome") as file:
        if kind == "ome":
            file.write(stored, subifds=2, metadata={"axes": "YXS"}, **options)
            for by in (2, 4):
                file.write(stored[::by, ::by], subfiletype=1, **options)
            return_thumbnail = stored[::10, ::10]
            file.write(return_thumbnail, photometric="rgb", metadata={"axes": "YXS"})
        else:
            about = "Aperio Image Library v11\n96x80 (256x256) |AppMag = 20|MPP = 0.5"
            file.write(stored, description=about, metadata=None, **options)
            file.write(stored[::10, ::10], photometric="rgb", metadata=None)
            for by in (2, 4):
                file.write(stored[::by, ::by], description=about, metadata=None, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["ome", "svs"])
def test_every_level_of_a_slide(kind):
    stored = numbers("u1", (280, 360, 3))
    raw = pyramid(kind, stored)
    for level in range(3):
        same_windows(raw, 3, stored[:: 2**level, :: 2**level], level=level)
    with pytest.raises(BadImage, match=r"has 3 levels, from 0; --data\.level is 3"):
        plane(raw, 3, level=3)
    with pytest.raises(BadImage, match=r"has 1 level; --data\.level is 1"):
        plane(tiff(stored, photometric="rgb"), 3, level=1)


@pytest.mark.parametrize("cog", [False, True])
def test_overviews_of_gdal_are_levels_with_their_masks(tmp_path, cog):
    stored, mask = numbers("u2", (2, 280, 360)), np.full((280, 360), 255, np.uint8)
    mask[:100] = 0
    raw = gdal(stored, mask=mask, overviews=() if cog else (2, 4), compress="ZSTD")
    path = tmp_path / "a.tif"
    path.write_bytes(raw)
    if cog:
        options = {"driver": "COG", "blocksize": 128, "compress": "ZSTD"}
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            rasterio.shutil.copy(path, tmp_path / "cog.tif", **options)
        path = tmp_path / "cog.tif"
        raw = path.read_bytes()
    for level in range(1, 2 if cog else 3):
        with rasterio.open(path, overview_level=level - 1) as file:
            expected, valid = file.read(masked=False), file.dataset_mask()
        found = plane(raw, 2, level=level).read()
        np.testing.assert_array_equal(found.missing[..., 0], valid == 0)
        at = valid > 0
        np.testing.assert_array_equal(found.pixels[at], expected.transpose(1, 2, 0)[at])
        same_windows(raw, 2, level=level)
