"""Formats beside TIFF: what Pillow and imagecodecs write, at the depth that they write it."""

import builtins
import io
import re
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.formats import format_of
from ssl_vit.data.headers import coded_size
from tests.unit.data.test_decode import png16
from tests.unit.data.test_pairs import gray_png

RNG = np.random.default_rng(0)
Y, X = np.mgrid[:48, :64]
SMOOTH = np.stack([X * 3, Y * 4, X * 3 // 2], -1).astype(np.uint8)
RGB = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 65536, (12, 20, 3), dtype=np.uint16)


def pillow(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(raw: bytes, channels: int, slices: str = "middle") -> np.ndarray:
    """(H, W, C)."""
    return decode(raw, channels, ReadConfig(slices=slices)).numpy().transpose(1, 2, 0)


def near(raw: bytes, expected: np.ndarray, most: float) -> None:
    found = decoded(raw, expected.shape[2])
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).mean() < most


def deep(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.float32) / np.float32(65535)


# --- AVIF, HEIC, JPEG 2000, JPEG XL ------------------------------------------------------------


def test_avif_and_heic():
    near(pillow(SMOOTH, "AVIF", quality=95), SMOOTH, 3)
    ten = imagecodecs.avif_encode(SMOOTH.astype(np.uint16) * 4, level=95, bitspersample=10)
    near(ten, SMOOTH, 3)  # photographs: read at 8 bits
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(SMOOTH)).save(buffer, quality=95)
    near(buffer.getvalue(), SMOOTH, 3)
    assert decoded(buffer.getvalue(), 1).shape == (48, 64, 1)


def test_heic_without_its_library_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "pillow_heif":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    with pytest.raises(BadImage, match=re.escape("pip install 'ssl_vit[heif]'")):
        decode(heic, 3)


@pytest.mark.parametrize("form", ["jp2", "j2k"])
@pytest.mark.parametrize(
    ("dtype", "most", "bands"),
    [("u1", 255, 3), ("u1", 255, 5), ("u2", 65535, 1), ("u2", 4095, 3), ("u2", 65535, 13)],
)
def test_jpeg_2000_at_every_depth(form, dtype, most, bands):
    stored = RNG.integers(0, most, (40, 50, bands)).astype(dtype)
    shown = stored[..., 0] if bands == 1 else stored
    raw = imagecodecs.jpeg2k_encode(shown, level=0, reversible=True, codecformat=form)
    expected = stored if dtype == "u1" else deep(stored)
    np.testing.assert_array_equal(decoded(raw, bands), expected, strict=True)


def test_jpeg_2000_with_a_palette():
    palette = Image.fromarray(RGB).quantize(16)
    near(pillow(palette.convert("RGB"), "JPEG2000"), np.asarray(palette.convert("RGB")), 0.01)


@pytest.mark.parametrize(("dtype", "most"), [("u1", 255), ("u2", 65535), ("f4", 1)])
@pytest.mark.parametrize("bands", [1, 3])
def test_jpeg_xl_at_every_depth(dtype, most, bands):
    stored = (RNG.random((40, 50, bands)) * most).astype(dtype)
    shown = stored[..., 0] if bands == 1 else stored
    raw = imagecodecs.jpegxl_encode(shown, lossless=True)
    expected = {"u1": lambda a: a, "u2": deep, "f4": lambda a: a}[dtype](stored)
    np.testing.assert_array_equal(decoded(raw, bands), expected, strict=True)


def test_opacity_of_the_newer_formats_is_dropped():
    rgba = RNG.integers(0, 256, (40, 50, 4), dtype=np.uint8)
    xl = imagecodecs.jpegxl_encode(rgba, lossless=True)
    np.testing.assert_array_equal(decoded(xl, 4)[..., 3], rgba[..., 3])
    two = imagecodecs.jpegxl_encode(rgba[..., :2].copy(), lossless=True)
    for raw in (xl, pillow(rgba, "JPEG2000"), pillow(rgba, "AVIF", quality=100)):
        assert decoded(raw, 3).shape == (40, 50, 3)
    assert decoded(two, 1).shape == (40, 50, 1)


# --- PNG and PPM -------------------------------------------------------------------------------


# Of Adam7's seven passes: first column and row, and steps from one to the next.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip


def interlaced(image: np.ndarray, colour_type: int) -> bytes:
    """A PNG in seven passes, written by hand: neither Pillow nor imagecodecs writes any."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = image.shape[:2]
    big = image.astype(image.dtype.newbyteorder(">"))
    parts = [big[y::by_row, x::by_column] for x, y, by_column, by_row in PASSES]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    bits = 8 * image.dtype.itemsize
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 1)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(12, 20), (3, 2)])
@pytest.mark.parametrize(("bands", "colour_type"), [(1, 0), (2, 4), (3, 2), (4, 6)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_interlaced_png(dtype, bands, colour_type, size):
    """Also so small that some passes are empty."""
    image = RNG.integers(0, np.iinfo(dtype).max + 1, (*size, bands), dtype=dtype)
    expected = image if dtype == np.uint8 else deep(image)
    found = decoded(interlaced(image, colour_type), bands)
    np.testing.assert_array_equal(found, expected, strict=True)


def test_16_bit_png_with_opacity():
    gray = RNG.integers(0, 65536, (12, 20, 2), dtype=np.uint16)
    raw = png16(gray, 4)
    np.testing.assert_array_equal(decoded(raw, 2), deep(gray), strict=True)
    np.testing.assert_array_equal(decoded(raw, 1), deep(gray[..., :1]), strict=True)
    np.testing.assert_array_equal(decoded(raw, 3), deep(gray[..., [0, 0, 0]]), strict=True)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_png_of_few_bits_is_spread_over_eight(bits):
    stored = (np.arange(30, dtype=np.uint8).reshape(5, 6)) % 2**bits
    found = decoded(gray_png(stored, bits), 1)
    np.testing.assert_array_equal(found[..., 0], stored * (255 // (2**bits - 1)), strict=True)


@pytest.mark.parametrize("extra", ["text", "many", "profile"])
@pytest.mark.parametrize("depth", [8, 16])
def test_png_with_a_large_text_or_profile(extra, depth):
    """Which Pillow refuses, because they could be bombs; they are left out, not unpacked."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    plain = pillow(RGB, "PNG") if depth == 8 else png16(RGB16, 2)
    large = zlib.compress(bytes(80 << 20))
    text = b"Comment\0\0" + zlib.compress(bytes(900_000), 1)
    more = {
        "text": chunk(b"zTXt", b"Comment\0\0" + large),
        "many": b"".join(chunk(b"zTXt", text) for _ in range(80)),
        "profile": chunk(b"iCCP", b"name\0\0" + large),
    }[extra]
    raw = plain[:33] + more + plain[33:]
    if depth == 8:
        with pytest.raises(ValueError, match=r"too large|Too much memory"):
            Image.open(io.BytesIO(raw)).load()
    np.testing.assert_array_equal(decoded(raw, 3), RGB if depth == 8 else deep(RGB16), strict=True)
    with pytest.raises(BadImage):
        decode(raw[:-60], 3)


def test_png_text_within_bounds_changes_nothing():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", "a prompt" * 9999, zip=True)
    np.testing.assert_array_equal(decoded(pillow(RGB, "PNG", pnginfo=info), 3), RGB)


@pytest.mark.parametrize("most", [1023, 4095, 65535])
def test_deep_ppm_keeps_its_depth(most):
    """Scaled to the whole range by its own largest value, as gray is by Pillow."""
    stored = RNG.integers(0, most + 1, (12, 20, 3)).astype(np.uint16)
    expected = np.rint(stored * (65535 / most)).astype(np.uint16)
    binary = b"P6 # a comment\n20 12\n%d\n" % most + stored.astype(">u2").tobytes()
    plain = b"P3\n20 12 %d\n" % most + " ".join(map(str, stored.ravel())).encode()
    for raw in (binary, plain):
        np.testing.assert_array_equal(decoded(raw, 3), deep(expected), strict=True)
        with pytest.raises(BadImage):
            decode(raw[:-40], 3)
    gray = b"P5\n20 12\n%d\n" % most + stored[..., 0].astype(">u2").tobytes()
    assert np.abs(decoded(gray, 1)[..., 0] - deep(expected[..., 0])).max() < 1e-4


def test_pbm_and_pfm():
    bits = RNG.random((12, 20)) > 0.5
    raw = b"P4\n20 12\n" + np.packbits(~bits, axis=1).tobytes()
    np.testing.assert_array_equal(decoded(raw, 1)[..., 0], bits * np.uint8(255))
    floats = RNG.normal(size=(12, 20)).astype(np.float32)
    raw = b"Pf\n20 12\n-1.0\n" + floats[::-1].astype("<f4").tobytes()
    np.testing.assert_array_equal(decoded(raw, 1)[..., 0], floats)


# --- JPEG --------------------------------------------------------------------------------------


def test_jpeg_of_twelve_bits_and_lossless():
    stored = (np.add.outer(np.arange(64) * 30, np.arange(64) * 30)).astype(np.uint16)
    raw = imagecodecs.jpeg8_encode(stored, level=98, bitspersample=12)
    found = decoded(raw, 1)[..., 0]
    assert found.dtype == np.float32
    assert np.abs(found * 65535 - stored).max() < 30
    for cut in np.linspace(20, len(raw) - 2, 20).astype(int):
        with pytest.raises(BadImage):
            decode(raw[:cut], 1)
    lossless = imagecodecs.jpeg8_encode(RGB, lossless=True)
    np.testing.assert_array_equal(decoded(lossless, 3), RGB, strict=True)


@pytest.mark.parametrize("kind", ["cmyk", "ycck"])
def test_jpeg_of_inks_is_as_pillow_reads_it(kind):
    """Inks of JPEG files are inverted, as Adobe has them."""
    inks = np.asarray(Image.fromarray(SMOOTH).convert("CMYK"))
    raw = {
        "cmyk": lambda: pillow(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95),
        "ycck": lambda: imagecodecs.jpeg8_encode(
            255 - inks, level=95, colorspace="CMYK", outcolorspace="YCCK"
        ),
    }[kind]()
    expected = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)
    assert np.abs(decoded(raw, 3) - expected).mean() < 2
    assert np.abs(expected - SMOOTH).mean() < 4


# --- what a file is ----------------------------------------------------------------------------


KINDS = {
    "JPEG": pillow(SMOOTH, "JPEG"),
    "PNG": pillow(SMOOTH, "PNG"),
    "GIF": pillow(SMOOTH[..., 0], "GIF"),
    "BMP": pillow(SMOOTH, "BMP"),
    "WEBP": pillow(SMOOTH, "WEBP"),
    "TIFF": pillow(SMOOTH, "TIFF"),
    "PPM": pillow(SMOOTH, "PPM"),
    "AVIF": pillow(SMOOTH, "AVIF"),
    "JPEG2000": pillow(SMOOTH, "JPEG2000"),
    "JPEGXL": imagecodecs.jpegxl_encode(SMOOTH.astype(np.uint16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_is_known_by_its_first_bytes(kind):
    assert format_of(KINDS[kind][:64]) == kind
    assert decode(KINDS[kind], 3).shape == (3, 48, 64)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"BM is no bitmap: it is a text that begins so, and goes on for long",
        b"P5 is a page of A5; this text has a number behind it, later: 3",
        b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(32),
        b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(32),
        b"RIFF\0\0\0\0WAVEfmt ",
        b"%PDF-1.7\n",
        b"PK\3\4",
        b"\x89HDF\r\n\x1a\n",
    ],
)
def test_other_files_are_no_images(head):
    assert format_of(head) == ""


@pytest.mark.parametrize("size", [(1, 1), (48, 64), (63, 65), (300, 1000), (1000, 300), (256, 512)])
def test_sizes_are_read_off_headers(size):
    image = np.zeros((*size, 3), np.uint8)
    image[:, : size[1] // 2] = 200
    encoders = {
        "jpeg": lambda: pillow(image, "JPEG"),
        "png": lambda: pillow(image, "PNG"),
        "webp": lambda: pillow(image, "WEBP"),
        "webp lossless": lambda: pillow(image, "WEBP", lossless=True),
        "webp alpha": lambda: pillow(np.dstack([image, image[..., 0]]), "WEBP"),
        "jp2": lambda: imagecodecs.jpeg2k_encode(image),
        "j2k": lambda: imagecodecs.jpeg2k_encode(image, codecformat="j2k"),
        "jxl": lambda: imagecodecs.jpegxl_encode(image),
        "jxl in a box": lambda: imagecodecs.jpegxl_encode(image.astype(np.uint16)),
        "lerc": lambda: imagecodecs.lerc_encode(image),
    }
    assert {name: coded_size(encode()) for name, encode in encoders.items()} == dict.fromkeys(
        encoders, size
    )


@pytest.mark.parametrize("kind", ["JPEGXL", "JPEG2000", "PNG", "PPM", "JPEG"])
def test_sizes_are_refused_before_memory_is_taken(kind, monkeypatch):
    stored = np.zeros((64, 64, 3), np.uint16)
    raw = {
        "JPEGXL": lambda: imagecodecs.jpegxl_encode(stored),
        "JPEG2000": lambda: imagecodecs.jpeg2k_encode(stored),
        "PNG": lambda: imagecodecs.png_encode(stored),
        "PPM": lambda: b"P6\n64 64\n65535\n" + stored.tobytes(),
        "JPEG": lambda: imagecodecs.jpeg8_encode(stored, bitspersample=12),
    }[kind]()
    for name in ("jpegxl", "jpeg2k", "png", "jpeg8"):
        monkeypatch.setattr(imagecodecs, f"{name}_decode", pytest.fail)
    monkeypatch.setattr("ssl_vit.data.raster.MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(BadImage, match="has 4096 values per channel, more than 4095: too large"):
        decode(raw, 3)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "JPEGXL"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.97])
def test_truncated_files_of_the_newer_formats_are_bad(kind, share):
    raw = KINDS[kind]
    with pytest.raises(BadImage):
        decode(raw[: int(len(raw) * share)], 3)


# --- frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_of_an_animation_the_first_frame_unless_another_is_asked_for(kind):
    frames = [np.full((12, 20, 3), value, np.uint8) for value in (10, 90, 170, 250)]
    images = [Image.fromarray(frame) for frame in frames]
    raw = pillow(images[0], kind, save_all=True, append_images=images[1:])
    for slices, number in (("middle", 0), ("all", 0), ("0", 0), ("2", 2)):
        found = decoded(raw, 3, slices)
        assert np.abs(found.astype(int) - frames[number]).max() < 6
    with pytest.raises(BadImage, match=r"has 4 planes, from 0; --data\.slices is 4"):
        decoded(raw, 3, "4")


@pytest.mark.parametrize("raw", [KINDS["JPEG"], KINDS["PPM"], png16(RGB16, 2), KINDS["JPEGXL"]])
def test_a_still_has_one_plane(raw):
    assert decoded(raw, 3, "0").shape == decoded(raw, 3).shape
    with pytest.raises(BadImage, match=r"has 1 plane; --data\.slices is 1"):
        decoded(raw, 3, "1")
