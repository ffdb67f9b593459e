"""Every kind of image becomes the tensor it should, and every bad one a BadImage."""

import contextlib
import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ssl_vit.data import decode as decode_module
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.sources import open_source
from tests.conftest import SHARED

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (12, 20, 4), dtype=np.uint8)
GRAY = RGB[..., 0]
GRAY16 = RNG.integers(0, 65536, (12, 20), dtype=np.uint16)
RGB16 = RNG.integers(0, 65536, (12, 20, 3), dtype=np.uint16)
# Smooth, so that JPEG keeps it.
SMOOTH = np.stack(np.meshgrid(np.arange(64) * 3, np.arange(48) * 4), -1).astype(np.uint8)
SMOOTH = np.concatenate([SMOOTH, SMOOTH[..., :1] // 2], -1)


def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def png16(array: np.ndarray, colour_type: int, size: tuple[int, int] | None = None) -> bytes:
    """A 16-bit PNG written by hand: Pillow writes none with colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = size or array.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def same(tensor: torch.Tensor, hwc: np.ndarray) -> None:
    hwc = hwc[..., None] if hwc.ndim == 2 else hwc
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), hwc.transpose(2, 0, 1), strict=True)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_keep_every_value(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    same(decode(encoded(RGB, kind, **options), 3), RGB)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "PPM"])
def test_gray_files_stay_gray_or_are_repeated(kind):
    same(decode(encoded(GRAY, kind), 1), GRAY)
    same(decode(encoded(GRAY, kind), 3), np.repeat(GRAY[..., None], 3, -1))


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_as_pillow_decodes_it(progressive):
    raw = encoded(SMOOTH, "JPEG", quality=90, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(raw))).astype(int)
    image = decode(raw, 3)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 48, 64)
    assert np.abs(image.numpy().transpose(1, 2, 0) - expected).max() <= 2
    gray = decode(raw, 1)
    assert gray.shape == (1, 48, 64)
    assert np.abs(gray.numpy()[0] - SMOOTH @ [0.299, 0.587, 0.114]).max() < 6


def test_cmyk_jpeg_becomes_rgb():
    raw = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(raw, 3).numpy().transpose(1, 2, 0) - SMOOTH.astype(int)).mean() < 4
    assert decode(raw, 4).shape == (4, 48, 64)


def test_jpeg_that_torchvision_refuses_is_left_to_pillow(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Unsupported color conversion request")

    raw = encoded(SMOOTH, "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(raw)))
    monkeypatch.setattr(decode_module, "decode_jpeg", refuse)
    same(decode(raw, 3), expected)


def test_alpha_palette_and_bilevel():
    same(decode(encoded(RGBA, "PNG"), 3), RGBA[..., :3])
    same(decode(encoded(RGBA, "PNG"), 4), RGBA)
    palette = Image.fromarray(RGB).quantize(16)
    same(decode(encoded(palette, "PNG"), 3), np.asarray(palette.convert("RGB")))
    see_through = encoded(palette, "PNG", transparency=bytes(range(16)))
    same(decode(see_through, 3), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(GRAY > 99)
    same(decode(encoded(bits, "PNG"), 1), (GRAY > 99).astype(np.uint8) * 255)
    two = Image.fromarray(RGBA).convert("LA")
    same(decode(encoded(two, "PNG"), 2), np.asarray(two))
    same(decode(encoded(two, "PNG"), 1), np.asarray(two)[..., 0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_files_keep_their_depth(kind):
    expected = GRAY16.astype(np.float32) / np.float32(65535)
    same(decode(encoded(GRAY16, kind), 1), expected)
    same(decode(encoded(GRAY16, kind), 3), np.repeat(expected[..., None], 3, -1))


def test_16_bit_colour_files_keep_their_depth():
    expected = RGB16.astype(np.float32) / np.float32(65535)
    same(decode(png16(RGB16, 2), 3), expected)
    same(decode(tiff(RGB16, photometric="rgb"), 3), expected)
    same(decode(npy(RGB16), 3), expected)
    rgba = np.concatenate([RGB16, GRAY16[..., None]], -1)
    same(decode(png16(rgba, 6), 3), expected)
    same(decode(png16(rgba, 6), 4), rgba.astype(np.float32) / np.float32(65535))
    same(decode(tiff(rgba, photometric="rgb", extrasamples=["unassalpha"]), 3), expected)
    planar = rgba.transpose(2, 0, 1)
    options = {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["unassalpha"]}
    same(decode(tiff(planar, **options), 3), expected)


def test_tiff_with_many_channels_in_any_layout():
    many = RNG.integers(0, 65536, (12, 20, 7), dtype=np.uint16)
    expected = many.astype(np.float32) / np.float32(65535)
    planes = many.transpose(2, 0, 1)
    gray = {"photometric": "minisblack"}
    same(decode(tiff(many, planarconfig="contig", **gray), 7), expected)
    same(decode(tiff(planes, planarconfig="separate", **gray), 7), expected)
    same(decode(tiff(planes, **gray), 7), expected)  # a page for each channel
    four = RGBA.copy()
    same(decode(tiff(four, planarconfig="contig", extrasamples=[0, 0, 0], **gray), 4), four)
    depth = RNG.normal(size=(12, 20)).astype(np.float32)
    same(decode(tiff(depth), 1), depth)
    same(decode(tiff(depth, compression="zlib"), 1), depth)


def test_arrays_by_kind_of_number():
    floats = RNG.normal(size=(5, 6)) * 1000
    same(decode(floats, 1), floats.astype(np.float32))
    same(decode(GRAY > 99, 1), (GRAY > 99).astype(np.uint8) * 255)
    same(decode(GRAY16.astype(">u2"), 1), GRAY16.astype(np.float32) / np.float32(65535))
    same(decode(GRAY16.astype(np.int32) - 9, 1), GRAY16.astype(np.float32) - 9)
    same(decode(np.array([[-5, 7]], np.int16), 1), np.array([[-5, 7]], np.float32))


def test_arrays_by_layout():
    same(decode(RGB, 3), RGB)
    same(decode(np.ascontiguousarray(RGB.transpose(2, 0, 1)), 3), RGB)
    same(decode(GRAY, 3), np.repeat(GRAY[..., None], 3, -1))
    same(decode(GRAY[None], 3), np.repeat(GRAY[..., None], 3, -1))
    both = RNG.integers(0, 256, (3, 9, 3), dtype=np.uint8)
    same(decode(both, 3), both)
    luminance = np.rint(RGB.astype(float) @ [0.299, 0.587, 0.114])
    assert np.abs(decode(RGB, 1).numpy()[0] - luminance).max() <= 1
    assert decode(RGB, 1).dtype == torch.uint8


def test_tensor_does_not_share_memory_with_the_array():
    array = GRAY.copy()
    array.setflags(write=False)
    decode(array, 1).zero_()
    np.testing.assert_array_equal(array, GRAY)


@pytest.mark.parametrize(
    ("image", "channels", "has"),
    [
        (encoded(RGBA, "PNG"), 5, "has 4 channels, --data.channels is 5"),
        (encoded(SMOOTH, "JPEG"), 4, "has 3 channels, --data.channels is 4"),
        (RGBA, 3, "has 4 channels, --data.channels is 3"),
        (GRAY, 2, "has 1 channel, --data.channels is 2"),
        (np.zeros((2, 2, 2, 2)), 2, "shape"),
    ],
)
def test_other_channel_counts_are_refused(image, channels, has):
    with pytest.raises(BadImage, match=has):
        decode(image, channels)


FILES = {
    "jpeg": encoded(SMOOTH, "JPEG"),
    "progressive": encoded(SMOOTH, "JPEG", progressive=True),
    "cmyk": encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
    "png": encoded(RGB, "PNG"),
    "png16": png16(RGB16, 2),
    "bmp": encoded(RGB, "BMP"),
    "gif": encoded(GRAY, "GIF"),
    "webp": encoded(RGB, "WEBP"),
    "ppm": encoded(RGB, "PPM"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff16": tiff(RGB16, photometric="rgb"),
    "tiff16-zlib": tiff(RGB16, photometric="rgb", compression="zlib"),
    "npy": npy(RGB16),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.97])
def test_truncated_files_are_bad(kind, share):
    raw = FILES[kind]
    assert decode(raw, 3).shape[0] == 3
    with pytest.raises(BadImage):
        decode(raw[: int(len(raw) * share)], 3)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tiff_cut_between_tiles_is_bad(compression):
    raw = tiff(np.tile(RGB16, (6, 6, 1)), photometric="rgb", tile=(16, 16), compression=compression)
    assert decode(raw, 3).shape == (3, 72, 120)
    with tifffile.TiffFile(io.BytesIO(raw)) as file:
        offsets = file.pages[0].dataoffsets
    for cut in sorted(offsets)[1:]:
        with pytest.raises(BadImage):
            decode(raw[:cut], 3)


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "cmyk"])
def test_a_jpeg_cut_anywhere_is_bad(kind):
    for end in range(len(FILES[kind])):
        for channels in (1, 3):
            with pytest.raises(BadImage):
                decode(FILES[kind][:end], channels)
    for end in range(len(FILES["cmyk"]) - 2):  # Pillow forgives a lost end mark, all pixels there
        with pytest.raises(BadImage):
            decode(FILES["cmyk"][:end], 4)


def test_damaged_bytes_raise_nothing_but_bad_image():
    rng = np.random.default_rng(1)
    for raw in FILES.values():
        for _ in range(30):
            damaged = bytearray(raw)
            for at in rng.integers(0, min(len(raw), 400), 4):
                damaged[at] = rng.integers(256)
            with contextlib.suppress(BadImage):
                assert decode(bytes(damaged), 3).shape[0] == 3


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0",
        b"no image at all" * 20,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x93NUMPY",
        b"II*\0",
        pickle.dumps([1, 2]),
        npy(np.array([[{}, 1]], dtype=object)),
        npy(np.array([["a"]])),
        npy(np.ones((4, 4), dtype=complex)),
        np.zeros((0, 5), np.uint8),
        np.zeros((5, 0, 3), np.uint8),
        np.array(3.0),
        np.array([[1.0, np.inf]]),
        np.array([[1.0, 1e300]]),
    ],
)
def test_what_is_no_image_is_bad(raw):
    with pytest.raises(BadImage):
        decode(raw, 1)


def test_a_pickle_in_an_npy_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    with pytest.raises(BadImage):
        decode(npy(np.array([Payload()], dtype=object)), 1)
    assert not (tmp_path / "executed").exists()


def test_decompression_bombs_are_bad_before_memory_is_taken(monkeypatch):
    huge = struct.pack(">HH", 20_000, 20_000)
    jpeg = FILES["jpeg"]
    at = jpeg.index(b"\xff\xc0") + 5
    assert struct.unpack(">HH", jpeg[at : at + 4]) == (48, 64)
    monkeypatch.setattr(decode_module, "decode_jpeg", pytest.fail)
    with pytest.raises(BadImage, match="too large"):
        decode(jpeg[:at] + huge + jpeg[at + 4 :], 3)
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(BadImage, match="DecompressionBomb"):
        decode(bomb, 3)
    with pytest.raises(BadImage, match="too large"):
        decode(png16(RGB16, 2, size=(20_000, 20_000)), 3)


def test_real_photographs(tmp_path, monkeypatch):
    folder = SHARED / "data" / "imagenet_sample"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set SSL_VIT_SHARED to the folder that holds data/")
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path))
    source = open_source(f"tar:{folder}/train-000000.tar")
    for i in range(10):
        raw, _ = source.read(i)
        assert isinstance(raw, bytearray)  # which torch decodes without a copy
        width, height = Image.open(io.BytesIO(raw)).size
        assert decode(raw, 3).shape == (3, height, width)
        assert decode(raw, 1).shape == (1, height, width)
        with pytest.raises(BadImage):
            decode(raw[: len(raw) // 2], 3)


def test_the_reason_of_a_bad_image_is_the_same_every_time():
    reasons = set()
    for _ in range(3):
        with pytest.raises(BadImage) as error:
            decode(bytearray(b"no image"), 3)
        reasons.add(str(error.value))
    assert reasons == {"UnidentifiedImageError: cannot identify image file"}
