"""Values without data: what counts as missing in a file, and how they arrive."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image
from rasterio.io import MemoryFile

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.raster import nodata_value
from ssl_vit.data.reduced import views_of
from tests.unit.data.test_pairs import gray_png

RNG = np.random.default_rng(0)
LOWEST = float(np.finfo(np.float32).min)


def geotiff(array: np.ndarray, declared: str | None = None, **options) -> bytes:
    """A TIFF of bands (H, W, C), with GDAL_NODATA as text."""
    tags = [] if declared is None else [(42113, "s", 0, declared, True)]
    buffer = io.BytesIO()
    several = array.ndim == 3 and array.shape[2] > 1
    array = array if several else array.reshape(array.shape[:2])
    gray = {"photometric": "minisblack"} | ({"planarconfig": "contig"} if several else {})
    tifffile.imwrite(buffer, array, extratags=tags, metadata=None, **(gray | options))
    return buffer.getvalue()


def decoded(raw, channels: int, nodata: str = "auto") -> np.ndarray:
    """(H, W, C)."""
    return decode(raw, channels, ReadConfig(nodata=nodata)).numpy().transpose(1, 2, 0)


def test_nan_and_the_declared_number_are_missing_in_each_band():
    stored = RNG.normal(size=(10, 12, 4)).astype(np.float32)
    stored[:3, :, 1], stored[5, 5, :], stored[9, :, 3] = np.nan, -9999, -9999
    expected = np.where(stored == -9999, np.nan, stored)
    np.testing.assert_array_equal(decoded(geotiff(stored, "-9999"), 4), expected, strict=True)
    only_nan = decoded(geotiff(stored), 4)
    np.testing.assert_array_equal(only_nan, stored)
    np.testing.assert_array_equal(decoded(geotiff(stored, "nan"), 4), stored)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_what_gdal_declares(dtype):
    stored = RNG.integers(1, 99, (2, 20, 30)).astype(dtype)
    value = 0 if dtype[0] == "u" else -5
    stored[0, :4] = value
    shape = {"count": 2, "height": 20, "width": 30, "dtype": stored.dtype}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", nodata=value, **shape) as file:
            file.write(stored)
        found = decoded(memory.read(), 2)
        with memory.open() as file:
            masks = file.read_masks().transpose(1, 2, 0) == 0
    assert found.dtype == np.float32
    assert masks.sum() == 120
    np.testing.assert_array_equal(np.isnan(found), masks)
    scale = {"u1": np.float32(255), "u2": np.float32(65535)}.get(dtype, np.float32(1))
    values = stored.transpose(1, 2, 0).astype(np.float32) / scale
    np.testing.assert_array_equal(found[~masks], values[~masks])


@pytest.mark.parametrize(
    ("text", "dtype", "value"),
    [
        ("-3.4028234663852886e+38", "f4", LOWEST),
        ("-3.40282346638529e+38", "f4", LOWEST),
        ("-3.40282347e+38", "f4", LOWEST),
        ("-3.4028235e+38", "f4", LOWEST),
        ("1e+20", "f4", np.float32(1e20)),
        ("-9999,5", "f8", -9999.5),
        (" 255 \0", "u1", 255),
        ("255.0", "u1", 255),
        ("1e2", "i2", 100),
        ("18446744073709551615", "u8", 2**64 - 1),
        ("9007199254740993", "i8", 2**53 + 1),
        ("inf", "f4", np.inf),
        ("-1.#INF", "f8", -np.inf),
        ("0", "?", False),
        # A value that the kind of number cannot hold is nowhere in it.
        ("-9999", "u1", None),
        ("256", "u1", None),
        ("0.5", "i4", None),
        ("nan", "i4", None),
        ("inf", "u2", None),
        ("-1.7976931348623157e+308", "f4", None),
        ("65536", "f2", None),
        ("none", "f4", None),
        ("", "u1", None),
    ],
)
def test_the_number_is_compared_in_the_files_own_kind(text, dtype, value):
    found = nodata_value(text, np.dtype(dtype))
    if value is None:
        assert found is None
    else:
        assert found == np.dtype(dtype).type(value)
        assert found.dtype == np.dtype(dtype)


@pytest.mark.parametrize("text", ["nan", "NaN", "-nan", "-1.#IND", "1.#QNAN"])
def test_every_spelling_of_nan(text):
    assert np.isnan(nodata_value(text, np.dtype("f4")))


@pytest.mark.parametrize("text", ["-3.4028234663852886e+38", "-3.40282347e+38", "inf", "-inf"])
def test_lowest_and_infinite_values_where_they_are_declared(text):
    stored = RNG.normal(size=(8, 9, 1)).astype(np.float32)
    stored[:2] = np.float32(text)
    found = decoded(geotiff(stored, text), 1)
    assert np.isnan(found[:2]).all()
    np.testing.assert_array_equal(found[2:], stored[2:])


def test_eight_bits_stay_where_the_number_does_not_occur():
    stored = RNG.integers(1, 255, (8, 9, 3), dtype=np.uint8)
    raw = geotiff(stored, "0", photometric="rgb")
    np.testing.assert_array_equal(decoded(raw, 3), stored, strict=True)
    stored[2, 3, 1] = 0
    found = decoded(geotiff(stored, "0", photometric="rgb"), 3)
    expected = stored.astype(np.float32) / np.float32(255)
    expected[2, 3, 1] = np.nan
    np.testing.assert_array_equal(found, expected, strict=True)
    gray = decoded(geotiff(stored, "0", photometric="rgb"), 1)
    assert np.argwhere(np.isnan(gray[..., 0])).tolist() == [[2, 3]]


def test_a_number_replaces_what_the_file_declares():
    stored = RNG.integers(1, 9, (8, 9, 2)).astype(np.int16)
    stored[0], stored[1] = -9999, 7777
    raw = geotiff(stored, "-9999")
    np.testing.assert_array_equal(np.isnan(decoded(raw, 2, "7777")), stored == 7777)
    np.testing.assert_array_equal(decoded(raw, 2, "none"), stored.astype(np.float32))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pillow(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["NPY", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000"])
def test_a_number_holds_for_every_format(kind):
    stored = RNG.integers(1, 255, (8, 9, 3), dtype=np.uint8)
    stored[2, 3] = (7, 0, 0)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(stored)
    raw = npy(stored) if kind == "NPY" else pillow(image, kind, **options)
    np.testing.assert_array_equal(decoded(raw, 3), stored, strict=True)
    np.testing.assert_array_equal(np.isnan(decoded(raw, 3, "0")), stored == 0)
    assert np.isnan(decoded(raw, 1, "0")).sum() == 1


def test_numbers_are_those_of_the_file():
    """Before depth is divided out, palettes and white-is-zero are resolved, 4 bits are spread."""
    deep = RNG.integers(0, 65535, (8, 9), dtype=np.uint16)
    deep[0] = 65535
    for raw in (pillow(Image.fromarray(deep), "PNG"), geotiff(deep), npy(deep)):
        assert np.isnan(decoded(raw, 1, "65535")[..., 0]).sum(1).tolist() == [9] + [0] * 7
        assert not np.isnan(decoded(raw, 1, "1")).any()  # 65535 / 65535
    white = geotiff(deep, photometric="miniswhite", compression="zlib")
    assert np.isnan(decoded(white, 1, "65535")[0]).all()
    index = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
    palette = Image.fromarray(index)
    palette.putpalette([9, 9, 9] * 5)
    for kind in ("PNG", "GIF", "TIFF"):
        raw = pillow(palette, kind, **({"optimize": False} if kind == "GIF" else {}))
        found = decoded(raw, 3, "4")
        np.testing.assert_array_equal(np.isnan(found), np.repeat((index == 4)[..., None], 3, -1))
    four = gray_png(index * 3, 4)
    np.testing.assert_array_equal(decoded(four, 1)[..., 0], index * 51)
    np.testing.assert_array_equal(np.isnan(decoded(four, 1, "12"))[..., 0], index == 4)
    opaque = RNG.integers(1, 255, (8, 9, 4), dtype=np.uint8)
    opaque[..., 3] = 0
    found = decoded(pillow(Image.fromarray(opaque), "PNG"), 3, "0")
    np.testing.assert_array_equal(found, opaque[..., :3], strict=True)


def test_jpeg_is_read_in_full_where_a_number_is_looked_for():
    image = Image.new("RGB", (900, 900), (200, 100, 50))
    image.paste((0, 0, 0), (0, 0, 450, 900))
    raw = pillow(image, "JPEG", quality=95)
    assert np.isnan(decoded(raw, 3, "0")).mean() > 0.4
    spec = ViewSpec((Crop((32, 32), scale=(0.9, 1.0), count=8),))
    reading = ReadConfig(nodata="0")
    crops = views_of(raw, 3, spec, 1, reading)[0]
    assert any(np.isnan(crop.crop.numpy()).any() for crop in crops)


def test_what_is_said_of_infinite_values_and_nan():
    stored = np.ones((8, 9, 1), np.float32)
    stored[0, 0] = np.inf
    for raw in (geotiff(stored), npy(stored), stored):
        with pytest.raises(BadImage, match=r"infinite values; --data\.nodata inf takes them"):
            decode(raw, 1)
        assert np.isnan(decoded(raw, 1, "inf")).sum() == 1
    stored[0, 0] = np.nan
    for raw in (geotiff(stored), npy(stored), stored):
        with pytest.raises(BadImage, match=r"holds NaN, .*--data\.nodata auto takes it"):
            decoded(raw, 1, "none")
        assert np.isnan(decoded(raw, 1, "7")).sum() == 1  # NaN is data nowhere
    with pytest.raises(BadImage, match="infinite"):  # beyond what float32 holds
        decode(np.full((8, 9), 1e300), 1)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f4"])
def test_elements_that_an_array_masks_are_missing(dtype):
    values = RNG.integers(0, 200, (8, 9, 3)).astype(dtype)
    mask = RNG.random((8, 9, 3)) > 0.8
    found = decoded(np.ma.MaskedArray(values, mask), 3)
    np.testing.assert_array_equal(np.isnan(found), mask)
    plain = decoded(np.ma.MaskedArray(values), 3)
    np.testing.assert_array_equal(plain, decoded(values, 3), strict=True)
    planes = np.ma.MaskedArray(values, mask).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded(planes, 3), found)


def test_gray_is_repeated_with_its_missing_values():
    stored = RNG.normal(size=(8, 9, 1)).astype(np.float32)
    stored[3] = np.nan
    found = decoded(geotiff(stored), 3)
    assert found.shape == (8, 9, 3)
    assert np.isnan(found[3]).all()
    assert not np.isnan(np.delete(found, 3, axis=0)).any()
