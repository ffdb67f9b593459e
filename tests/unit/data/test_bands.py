"""Chosen bands, and scales of GeoTIFFs."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rasterio.io import MemoryFile

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.images import open_images
from ssl_vit.data.scales import declared_scales
from ssl_vit.data.sources import open_source
from tests.unit.data.test_tiff import gdal, numbers, tiff

GRAY = {"photometric": "minisblack"}


def read(raw: bytes, bands: tuple[int, ...], channels: int = 0, **reading) -> np.ndarray:
    """(H, W, C)."""
    reading = ReadConfig(bands=bands, **reading)
    return decode(raw, channels or len(bands), reading).numpy().transpose(1, 2, 0)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


STORED = numbers("u1", (40, 50, 13))
FIRST = np.ascontiguousarray(STORED.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "raw",
    [
        tiff(STORED, planarconfig="contig", **GRAY),
        tiff(STORED, planarconfig="contig", compression="zstd", tile=(16, 32), **GRAY),
        tiff(FIRST, planarconfig="separate", **GRAY),
        tiff(FIRST, planarconfig="separate", compression="lzw", tile=(16, 32), **GRAY),
        tiff(FIRST, **GRAY),
        tiff(STORED, **GRAY),
        gdal(FIRST, interleave="band", compress="DEFLATE"),
        gdal(FIRST, interleave="pixel", compress="DEFLATE", predictor=2),
        npy(STORED),
        npy(FIRST),
        npy(np.asfortranarray(STORED)),
    ],
    ids=[f"layout {number}" for number in range(11)],
)
def test_bands_by_number_from_one_in_any_layout(raw):
    for bands in ((4, 3, 2), (13,), (1, 1, 8, 2), tuple(range(13, 0, -1))):
        index = [band - 1 for band in bands]
        np.testing.assert_array_equal(read(raw, bands), STORED[..., index])
    with pytest.raises(
        BadImage, match=r"^has 13 bands; --data\.bands asks for band 14, counted fr"
    ):
        read(raw, (1, 14))


def test_bands_of_photographs():
    rgb = numbers("u1", (40, 50, 3))
    image = Image.fromarray(rgb)
    jpeg = encoded(image, "JPEG", quality=95)
    for raw in (encoded(image, "PNG"), encoded(image, "BMP"), jpeg):
        whole = np.asarray(Image.open(io.BytesIO(raw)))
        np.testing.assert_array_equal(read(raw, (3, 1)), whole[..., [2, 0]])
    rgba = np.concatenate([rgb, rgb[..., :1]], axis=2)
    opaque = encoded(Image.fromarray(rgba), "PNG")
    np.testing.assert_array_equal(read(opaque, (4, 1)), rgba[..., [3, 0]])
    deep = numbers("u2", (40, 50, 3))
    import imagecodecs

    expected = deep[..., ::-1].astype(np.float32) / np.float32(65535)
    np.testing.assert_array_equal(read(imagecodecs.png_encode(deep), (3, 2, 1)), expected)
    with pytest.raises(BadImage, match=r"has 1 band; --data\.bands asks for band 2"):
        read(encoded(Image.fromarray(rgb[..., 0]), "PNG"), (2,))
    palette = image.quantize(16)
    for raw in (encoded(palette, "PNG"), encoded(palette, "TIFF")):
        np.testing.assert_array_equal(
            read(raw, (3, 1)), np.asarray(palette.convert("RGB"))[..., [2, 0]]
        )


def test_white_is_zero_and_missing_values_follow_their_bands():
    stored = numbers("u1", (3, 20, 30))
    stored[0, :5] = 9
    found = read(gdal(stored, nodata=9), (3, 1))
    np.testing.assert_array_equal(np.isnan(found), (stored == 9).transpose(1, 2, 0)[..., [2, 0]])
    mask = np.full((20, 30), 255, np.uint8)
    mask[:3] = 0
    found = read(gdal(stored, mask=mask), (2, 1))
    np.testing.assert_array_equal(np.isnan(found).all(-1), mask == 0)
    gray = numbers("u1", (20, 30, 2))
    options = {"planarconfig": "contig", "extrasamples": ["unassalpha"]}
    inverted = tiff(gray, photometric="miniswhite", **options)
    expected = np.stack([gray[..., 1], 255 - gray[..., 0]], -1)
    np.testing.assert_array_equal(read(inverted, (2, 1)), expected)


def test_one_band_is_gray_and_three_may_become_gray():
    raw = gdal(FIRST)
    np.testing.assert_array_equal(read(raw, (8,), channels=3), STORED[..., [7, 7, 7]])
    assert read(raw, (4, 3, 2), channels=1).shape == (40, 50, 1)
    with pytest.raises(BadImage, match=r"has 2 channels, --data\.channels is 3"):
        read(raw, (4, 3), channels=3)


def test_channels_follow_the_bands():
    assert DataConfig(bands=(4, 3, 2)).channels == 3
    assert DataConfig(bands=(8,)).channels == 3  # gray, repeated
    assert DataConfig(bands=(4, 3, 2), channels=1).channels == 1
    assert DataConfig(bands=(4, 3, 2, 8)).channels == 4
    assert DataConfig(bands=(4, 3, 2, 8), channels=4, mean=(0.5,) * 4, std=(0.5,) * 4).channels == 4
    with pytest.raises(
        UserError, match=r"names 4 bands; --data\.channels is 5: give --data\.channels 4"
    ):
        DataConfig(bands=(4, 3, 2, 8), channels=5)
    with pytest.raises(UserError, match=r"--data\.bands is .*0.* must be 1 or more"):
        ReadConfig(bands=(0, 1))


def test_a_lacking_band_is_one_line(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(gdal(numbers("u1", (3, 20, 30))))
    options = DataConfig(train=f"flat:{tmp_path}", bands=(4, 3, 2))
    with pytest.raises(
        UserError, match=r"^none of 3 images .* 3 bands; --data\.bands asks for band 4"
    ):
        open_images(options, seed=0)


# --- scales ------------------------------------------------------------------------------------


def with_scales(array: np.ndarray, scales: tuple, offsets: tuple, **options) -> bytes:
    count, height, width = array.shape
    shape = {"count": count, "height": height, "width": width, "dtype": array.dtype}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", **shape, **options) as file:
            file.write(array)
            file.scales, file.offsets = scales, offsets
        return memory.read()


def test_scales_are_applied_if_asked_for():
    stored = numbers("u2", (3, 20, 30))
    stored[0, :4] = 7
    raw = with_scales(stored, (1e-4, 2e-4, 1.0), (0.0, -0.1, 0.0), nodata=7)
    plain = read(raw, (3, 2, 1))
    expected = stored[::-1].transpose(1, 2, 0).astype(np.float32) / np.float32(65535)
    at = ~np.isnan(plain)
    np.testing.assert_array_equal(plain[at], expected[at])
    found = read(raw, (3, 2, 1), values="scaled")
    with MemoryFile(raw) as memory, memory.open() as file:
        pairs = list(zip(file.scales, file.offsets, strict=True))[::-1]
    for band, (scale, offset) in enumerate(pairs):
        values = stored[2 - band] * scale + offset
        lost = stored[2 - band] == 7
        np.testing.assert_array_equal(np.isnan(found[..., band]), lost)
        np.testing.assert_allclose(found[..., band][~lost], values[~lost], rtol=1e-6)
    whole = decode(raw, 3, ReadConfig(values="scaled")).numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(whole, found[..., ::-1])
    byte = gdal(numbers("u1", (3, 20, 30)))
    assert torch.equal(decode(byte, 3, ReadConfig(values="scaled")), decode(byte, 3))


def test_scales_that_are_no_numbers_are_bad():
    text = '<GDALMetadata><Item name="SCALE" sample="0" role="scale">much</Item></GDALMetadata>'
    with pytest.raises(BadImage, match="its scales cannot be read"):
        declared_scales(text)
    assert declared_scales('<GDALMetadata><Item name="a">1</Item></GDALMetadata>') == {}


def said(folder: Path, caplog, **reading) -> list[tuple[int, str]]:
    caplog.set_level(logging.INFO, "ssl_vit")
    caplog.clear()
    open_source(f"flat:{folder}", DataConfig(**reading))
    return [(record.levelno, record.getMessage().partition(": ")[2]) for record in caplog.records]


def test_scales_are_said_and_different_ones_are_a_warning(tmp_path, caplog):
    stored = numbers("u2", (3, 20, 30))
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(with_scales(stored, (1e-4,) * 3, (-0.1,) * 3))
    [(level, text)] = said(tmp_path, caplog)
    assert level == logging.INFO
    assert text.endswith(
        "declare scales of their bands (0.0001 -0.1 in 3); values are as stored, --data.values "
        "scaled applies them"
    )
    assert said(tmp_path, caplog, values="scaled") == []
    (tmp_path / "2.tif").write_bytes(with_scales(stored, (1.0,) * 3, (0.0,) * 3))
    [(level, text)] = said(tmp_path, caplog)
    assert level == logging.WARNING
    assert "different scales of their bands (0.0001 -0.1 in 2, none in 1); values are as" in text
    [(level, text)] = said(tmp_path, caplog, values="scaled")
    assert level == logging.WARNING
    assert text.endswith(
        "1 of 3 files looked at declare no scale: with --data.values scaled their "
        "values are as stored"
    )
