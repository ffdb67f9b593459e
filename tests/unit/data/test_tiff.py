"""TIFF files as tifffile, Pillow and GDAL write them: values equal what was written."""

import io
import struct

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
from PIL import Image
from rasterio.io import MemoryFile

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data import tiff as tiff_module
from ssl_vit.data.decode import BadImage, decode

RNG = np.random.default_rng(0)
LOSSLESS = {
    "webp": {"compressionargs": {"lossless": True}},
    "jpegxl": {"compressionargs": {"lossless": True}},
    "jpeg2000": {"compressionargs": {"reversible": True, "level": 0}},
}


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, metadata=None, **options)
    return buffer.getvalue()


def gdal(array: np.ndarray, mask: np.ndarray | None = None, overviews=(), **options) -> bytes:
    """A GeoTIFF of bands (C, H, W) by GDAL; its mask is inside."""
    count, height, width = array.shape
    shape = {"count": count, "height": height, "width": width, "dtype": array.dtype}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(driver="GTiff", **shape, **options) as file:
            file.write(array)
            if mask is not None:
                file.write_mask(mask)
            if overviews:
                file.build_overviews(list(overviews))
        return memory.read()


def pillow(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


def numbers(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return RNG.random(shape) > 0.5
    if kind.kind == "f":
        return RNG.normal(size=shape).astype(kind)
    least, most = (int(getattr(np.iinfo(kind), side)) for side in ("min", "max"))
    return RNG.integers(max(least, -30_000), min(most, 60_000), shape).astype(kind)


def decoded(raw: bytes, channels: int, **reading) -> np.ndarray:
    """(H, W, C)."""
    return decode(raw, channels, ReadConfig(**reading)).numpy().transpose(1, 2, 0)


def same(raw: bytes, stored: np.ndarray) -> None:
    """Decoded with the channels of the file, as the values that were written, (H, W, C)."""
    stored = stored[..., None] if stored.ndim == 2 else stored
    expected = {
        "u1": lambda: stored,
        "b1": lambda: stored.astype(np.uint8) * np.uint8(255),
        "u2": lambda: stored.astype(np.float32) / np.float32(65535),
    }.get(stored.dtype.str[1:], lambda: stored.astype(np.float32))()
    np.testing.assert_array_equal(decoded(raw, stored.shape[2]), expected, strict=True)


# --- codecs, numbers, layouts ------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 3, 4, 7])
@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
def test_every_kind_of_number_in_every_layout(dtype, bands):
    stored = numbers(dtype, (40, 50, bands))
    gray = {"photometric": "rgb" if bands == 3 else "minisblack"}
    if bands == 1:
        same(tiff(stored[..., 0], **gray), stored)
        same(tiff(stored[..., 0], tile=(16, 32), compression="lzw", **gray), stored)
        return
    for tile in (None, (16, 32)):
        for byteorder in "<>":
            options = {"tile": tile, "byteorder": byteorder, "bigtiff": byteorder == ">", **gray}
            if dtype != "?":  # tifffile writes bits of several bands that no reader understands
                same(tiff(stored, planarconfig="contig", **options), stored)
            planes = np.ascontiguousarray(stored.transpose(2, 0, 1))
            same(tiff(planes, planarconfig="separate", compression="zstd", **options), stored)


@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize(
    "codec",
    ["lzw", "zstd", "deflate", "lzma", "packbits", "lerc", "webp", "jpegxl", "jpeg2000", "png"],
)
def test_every_lossless_codec(codec, dtype, bands):
    kinds = {"webp": ("u1",), "jpeg2000": ("u1", "u2"), "png": ("u1", "u2")}
    if dtype not in kinds.get(codec, (dtype,)) or (codec == "webp" and bands == 1):
        pytest.skip("the codec has no such images")
    stored = numbers(dtype, (40, 50, bands))
    shown = stored[..., 0] if bands == 1 else stored
    options = {"photometric": "rgb" if bands == 3 else "minisblack", "compression": codec}
    options |= {} if bands == 1 else {"planarconfig": "contig"}
    for tile in (None, (16, 32)):
        same(tiff(shown, tile=tile, **options, **LOSSLESS.get(codec, {})), stored)


@pytest.mark.parametrize(("predictor", "dtype"), [(2, "u1"), (2, "i2"), (2, "u4"), (3, "f2")])
@pytest.mark.parametrize("codec", ["lzw", "zstd", "deflate"])
def test_predictors(codec, predictor, dtype):
    for kind in (dtype, "f4", "f8") if predictor == 3 else (dtype,):
        stored = numbers(kind, (40, 50, 4))
        options = {"photometric": "minisblack", "planarconfig": "contig"}
        same(tiff(stored, compression=codec, predictor=predictor, **options), stored)


def test_jpeg_within_a_tiff():
    y, x = np.mgrid[:48, :64]
    smooth = np.stack([x * 3, y * 4, x * 3 // 2], -1).astype(np.uint8)
    for colours in ("rgb", "ycbcr"):  # tifffile turns RGB into the latter, and says so in the file
        how = {"level": 98, "outcolorspace": colours}
        raw = tiff(smooth, compression="jpeg", photometric="rgb", compressionargs=how)
        assert np.abs(decoded(raw, 3).astype(int) - smooth).max() < 12
    raw = gdal(smooth.transpose(2, 0, 1), compress="JPEG", photometric="YCBCR", jpeg_quality=98)
    assert np.abs(decoded(raw, 3).astype(int) - smooth).mean() < 2
    deep = smooth[..., 0].astype(np.uint16) * 16
    raw = tiff(deep, compression="jpeg", bitspersample=12, photometric="minisblack")
    assert np.abs(decoded(raw, 1)[..., 0] * 65535 - deep).max() < 200


def test_a_file_of_no_part_at_all_is_bad():
    """As a writer leaves that failed; zeros, if it were read."""
    raw = tiff(np.ones((64, 64), np.uint8), compression="zstd")
    with pytest.raises(BadImage, match="none of its strips or tiles is in the file"):
        decode(with_tags(raw, StripOffsets=0, StripByteCounts=0), 1)


@pytest.mark.parametrize("codec", ["group3", "group4", "tiff_ccitt", "packbits", "tiff_lzw"])
def test_bilevel_fax_codecs(codec):
    bits = Image.fromarray(RNG.random((30, 37)) > 0.5)
    raw = pillow(bits, compression=codec)
    np.testing.assert_array_equal(decoded(raw, 1)[..., 0], np.asarray(bits) * np.uint8(255))


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12, 14])
def test_few_bits_and_white_is_zero(bits, white_is_zero):
    """Up to 8 bits are scaled to 0..255, more are kept as in a file of 16."""
    stored = RNG.integers(0, 2**bits, (30, 37)).astype(np.uint8 if bits <= 8 else np.uint16)
    kind = "MINISWHITE" if white_is_zero else "MINISBLACK"
    raw = gdal(stored[None], nbits=bits, photometric=kind)
    black = 2**bits - 1 - stored if white_is_zero else stored
    scale = 255 // (2**bits - 1) if bits <= 8 else np.float32(1) / np.float32(65535)
    expected = black * scale if bits <= 8 else black.astype(np.float32) / np.float32(65535)
    np.testing.assert_array_equal(decoded(raw, 1)[..., 0], expected)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_few_bits_of_several_bands(bits, interleave):
    stored = RNG.integers(0, 2**bits, (3, 30, 37)).astype(np.uint8 if bits <= 8 else np.uint16)
    raw = gdal(stored, nbits=bits, interleave=interleave, photometric="MINISBLACK")
    scale = 255 // (2**bits - 1) if bits <= 8 else 1 / 65535
    assert np.abs(decoded(raw, 3) - stored.transpose(1, 2, 0) * scale).max() < 1e-6


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "f4"])
def test_white_is_zero_is_inverted_at_every_depth(dtype):
    """Floats have no largest value; signed integers are turned between their least and most."""
    stored = numbers(dtype, (20, 30))
    raw = tiff(stored, photometric="miniswhite")
    same(raw, stored if dtype == "f4" else ~stored)


def test_white_is_zero_leaves_opacity_alone():
    stored = numbers("u1", (20, 30, 2))
    raw = tiff(stored, photometric="miniswhite", planarconfig="contig", extrasamples=["unassalpha"])
    same(raw, np.stack([255 - stored[..., 0], stored[..., 1]], -1))


# --- colours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["assocalpha", "unassalpha"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_opacity_is_a_band_like_any_other(kind, dtype):
    stored = numbers(dtype, (20, 30, 4))
    stored[:5, :, 3] = 0  # where a reader that divides by it loses the colours
    raw = tiff(stored, photometric="rgb", extrasamples=[kind])
    same(raw, stored)
    np.testing.assert_array_equal(
        decoded(raw, 3), decoded(tiff(stored[..., :3], photometric="rgb"), 3)
    )
    gray = tiff(
        stored[..., :2], photometric="minisblack", planarconfig="contig", extrasamples=[kind]
    )
    same(gray, stored[..., :2])
    np.testing.assert_array_equal(decoded(gray, 1), decoded(gray, 2)[..., :1])


def test_a_fourth_band_that_is_no_opacity_is_not_dropped():
    raw = tiff(numbers("u1", (20, 30, 4)), photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(BadImage, match=r"has 4 channels, --data.channels is 3"):
        decode(raw, 3)


def test_palette_and_cmyk_become_rgb():
    palette = Image.fromarray(numbers("u1", (20, 30, 3))).quantize(16)
    np.testing.assert_array_equal(decoded(pillow(palette), 3), np.asarray(palette.convert("RGB")))
    few = gdal(RNG.integers(0, 4, (1, 20, 30), dtype=np.uint8), nbits=2, photometric="PALETTE")
    assert decode(few, 3).shape == (3, 20, 30)
    inks = Image.fromarray(numbers("u1", (20, 30, 4)), "CMYK")
    raw = pillow(inks)
    np.testing.assert_array_equal(decoded(raw, 3), np.asarray(inks.convert("RGB")))
    same(raw, np.asarray(inks))
    deep = np.asarray(inks).astype(np.uint16) * 257
    rgb = decoded(tiff(deep, photometric="separated"), 3)
    assert np.abs(rgb * 255 - np.asarray(inks.convert("RGB"))).max() < 0.51


@pytest.mark.parametrize("codec", [None, "tiff_lzw", "jpeg"])
def test_ycbcr_becomes_rgb(codec):
    y, x = np.mgrid[:48, :64]
    smooth = np.stack([x * 3, y * 4, x * 3 // 2], -1).astype(np.uint8)
    raw = pillow(
        Image.fromarray(smooth).convert("YCbCr"), **({"compression": codec} if codec else {})
    )
    assert np.abs(decoded(raw, 3).astype(int) - smooth).max() < 12


def test_colours_that_are_not_converted_are_named():
    channel = Image.fromarray(numbers("u1", (20, 30)))
    with pytest.raises(
        BadImage, match="CIELab colours, which are not converted: convert it to RGB"
    ):
        decode(pillow(Image.merge("LAB", [channel] * 3)), 3)
    with pytest.raises(BadImage, match="the raw data of a camera"):
        decode(tiff(numbers("u2", (20, 30)), photometric="cfa"), 1)
    with pytest.raises(BadImage, match="complex64 values, not numbers"):
        decode(gdal(np.ones((1, 20, 30), np.complex64)), 1)


# --- masks and overviews of GDAL ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tiled": True, "blockxsize": 16, "blockysize": 16, "interleave": "pixel"},
        {"overviews": [2, 4]},
        {"compress": "JPEG", "photometric": "YCBCR"},
    ],
    ids=["strips", "tiles", "overviews", "jpeg"],
)
def test_internal_masks_are_missing_values(options):
    stored, mask = numbers("u1", (3, 64, 80)), np.full((64, 80), 255, np.uint8)
    mask[:10], mask[:, :7] = 0, 0
    raw = gdal(stored, mask=mask, **options)
    found = decoded(raw, 3)
    np.testing.assert_array_equal(np.isnan(found), np.repeat(mask[..., None] == 0, 3, -1))
    plain = decoded(raw, 3, nodata="none")
    assert plain.dtype == np.uint8
    np.testing.assert_array_equal(
        found[mask > 0], plain[mask > 0].astype(np.float32) / np.float32(255)
    )
    if "compress" not in options:
        np.testing.assert_array_equal(plain, stored.transpose(1, 2, 0))
    assert decoded(gdal(stored, mask=np.full_like(mask, 255)), 3).dtype == np.uint8


def test_a_mask_behind_overviews(tmp_path):
    """As it lies where it was added last."""
    stored, mask = numbers("u1", (3, 64, 80)), np.full((64, 80), 255, np.uint8)
    mask[:10] = 0
    (tmp_path / "a.tif").write_bytes(gdal(stored, overviews=[2, 4]))
    inside = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True)
    with inside, rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write_mask(mask)
    raw = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(io.BytesIO(raw)) as file:
        assert [page.is_reduced for page in file.pages][:3] == [False, True, True]
    np.testing.assert_array_equal(np.isnan(decoded(raw, 3)[..., 0]), mask == 0)


def test_cloud_optimised_files_are_read_at_full_size(tmp_path):
    stored, mask = numbers("u2", (2, 600, 700)), np.full((600, 700), 255, np.uint8)
    mask[100:150] = 0
    (tmp_path / "a.tif").write_bytes(gdal(stored, mask=mask))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        rasterio.shutil.copy(
            tmp_path / "a.tif", tmp_path / "cog.tif", driver="COG", blocksize=128, compress="ZSTD"
        )
    found = decoded((tmp_path / "cog.tif").read_bytes(), 2)
    assert found.shape == (600, 700, 2)
    np.testing.assert_array_equal(np.isnan(found[..., 1]), mask == 0)


def test_tiles_that_are_left_out_of_a_file_are_missing():
    with MemoryFile() as memory:
        tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "sparse_ok": True}
        shape = {"height": 64, "width": 64, "count": 1, "dtype": "int16", "nodata": -9999}
        with memory.open(driver="GTiff", **shape, **tiles) as file:
            window = rasterio.windows.Window(0, 0, 16, 16)
            file.write(np.full((1, 16, 16), 7, np.int16), window=window)
        found = decoded(memory.read(), 1)
    assert (found[:16, :16] == 7).all()
    assert np.isnan(found).mean() == 15 / 16


@pytest.mark.parametrize("first", ["full", "reduced"])
def test_reduced_images_are_never_taken(first):
    stored = numbers("u1", (64, 64, 3))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        pages = [(stored, 0), (stored[::2, ::2], 1), (stored[::4, ::4], 1)]
        for page, kind in pages if first == "full" else pages[::-1]:
            file.write(page, photometric="rgb", subfiletype=kind, metadata=None)
    same(buffer.getvalue(), stored)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(stored, photometric="rgb", subifds=1)
        file.write(stored[::2, ::2], photometric="rgb", subfiletype=1)
    same(buffer.getvalue(), stored)


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["zstd", "lzw", "webp", "jpeg2000", "jpegxl", "lerc", "jpeg"])
def test_a_file_cut_in_its_data_is_bad(codec):
    stored = numbers("u1", (64, 80, 3))
    raw = tiff(stored, photometric="rgb", compression=codec, tile=(32, 32))
    assert decode(raw, 3).shape == (3, 64, 80)
    for cut in np.linspace(9, len(raw) - 20, 25).astype(int):
        with pytest.raises(BadImage):
            decode(raw[:cut], 3)


@pytest.mark.parametrize(
    "options",
    [
        {"ome": True, "metadata": {"axes": "ZCYX"}},
        {"ome": True, "metadata": {"axes": "ZCYX"}, "compression": "lzw"},
        {"imagej": True, "metadata": {"axes": "ZCYX"}},
        {"metadata": {"axes": "ZCYX"}},
    ],
    ids=["ome", "ome-lzw", "imagej", "shaped"],
)
def test_a_stack_that_was_cut_is_bad_or_the_same(options):
    """Neither fewer planes, nor others: what says how many there are may lie at the end."""
    buffer = io.BytesIO()
    stored = numbers("u2", (5, 3, 20, 30))
    tifffile.imwrite(buffer, stored, photometric="minisblack", **options)
    raw = buffer.getvalue()
    whole = decoded(raw, 3)
    np.testing.assert_array_equal(whole * 65535, stored[2].transpose(1, 2, 0))
    for cut in (*np.linspace(9, len(raw) - 100, 40).astype(int), len(raw) - 13, len(raw) - 1):
        try:
            found = decoded(raw[:cut], 3)
        except BadImage:
            continue
        assert cut > len(raw) - 100  # padding behind all pixels
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("codec", [None, "lzw"])
def test_pages_that_were_cut_are_bad(codec):
    """Even where the one that is read is whole: it need not be the middle of what there was."""
    raw = tiff(numbers("u2", (5, 20, 30)), photometric="minisblack", compression=codec)
    assert decode(raw, 1).shape == (1, 20, 30)
    for cut in np.linspace(len(raw) * 0.7, len(raw) - 20, 12).astype(int):
        with pytest.raises(BadImage):
            decode(raw[:cut], 1)


def with_tags(raw: bytes, **values: int) -> bytes:
    """A TIFF with other values in tags of its first page."""
    changed = bytearray(raw)
    with tifffile.TiffFile(io.BytesIO(raw)) as file:
        for name, value in values.items():
            tag = file.pages[0].tags[name]
            form = file.byteorder + tag.dataformat[-1]
            changed[tag.valueoffset : tag.valueoffset + struct.calcsize(form)] = struct.pack(
                form, value
            )
    return bytes(changed)


def test_sizes_are_refused_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr(tiff_module.Stack, "read", pytest.fail)
    raw = tiff(
        np.zeros((64, 64, 3), np.uint8), photometric="rgb", compression="zstd", tile=(32, 32)
    )
    for tags in (
        {"ImageWidth": 60_000, "ImageLength": 60_000},
        {"TileWidth": 60_000, "TileLength": 60_000},
    ):
        with pytest.raises(BadImage, match=r"too large|truncated"):
            decode(with_tags(raw, **tags), 3)
    with pytest.raises(BadImage, match=r"has 60000 channels, --data\.channels is 3"):
        decode(with_tags(raw, SamplesPerPixel=60_000), 3)


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2000", "jpegxl", "webp", "png", "lerc"])
def test_sizes_within_tiles_are_refused_before_memory_is_taken(codec, monkeypatch):
    """These codecs take the memory that their own header asks for, not what the TIFF says."""
    options = {"photometric": "rgb", "compression": codec, "rowsperstrip": 640}
    raw = tiff(np.zeros((640, 640, 3), np.uint8), **options)
    assert decode(raw, 3).shape == (3, 640, 640)
    monkeypatch.setattr(tiff_module.Stack, "read", pytest.fail)
    with pytest.raises(BadImage, match="a part of 20480 pixels holds 640 x 640"):
        decode(with_tags(raw, ImageLength=32), 3)
