"""Image and mask pairs: how they are found, what a mask file's numbers mean, what is refused."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ssl_vit.common.errors import UserError
from ssl_vit.data.decode import BadImage
from ssl_vit.data.eval_images import eval_batches
from ssl_vit.data.map_values import decode_mask, nearest_mask
from ssl_vit.data.pairs import PairImages, open_pairs

CLASSES = np.arange(12, dtype=np.uint8).reshape(3, 4)


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 3 and array.shape[2] not in (3, 4):
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)


def pairs_at(root: Path, names: tuple[str, ...] = ("a", "b"), size=(6, 8)) -> Path:
    for i, name in enumerate(names):
        write(root / f"images/{name}.jpg", np.full((*size, 3), 40 * i, np.uint8))
        write(root / f"masks/{name}.png", np.full(size, i, np.uint8))
    return root


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gray_png(values: np.ndarray, bits: int) -> bytes:
    """A grayscale PNG of 1, 2 or 4 bits by the specification; Pillow writes none of the latter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = values.shape
    planes = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(planes.reshape(height, -1).astype(np.uint8), axis=1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def as_palette(values: np.ndarray) -> Image.Image:
    """Indices whose colours are unlike them: a palette that counts down."""
    image = Image.fromarray(values).convert("L")
    made = Image.frombytes("P", image.size, image.tobytes())
    made.putpalette([255 - v for v in range(256) for _ in range(3)])
    return made


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


# --- which pairs --------------------------------------------------------------------------------


def test_both_forms_name_the_same_pairs(tmp_path):
    """At any depth, in the images' order; the ending may differ, hidden files do not count."""
    root = pairs_at(tmp_path, ("b", "deep/er/c", "a"))
    (root / "masks/.hidden.png").write_bytes(b"")
    short = open_pairs(f"pairs:{root}")
    long = open_pairs(f"pairs:{root}/images:{root}/masks")
    for pairs in (short, long):
        assert len(pairs) == 3
        names = [Path(pairs.name(i)).relative_to(root / "images").as_posix() for i in range(3)]
        assert names == ["a.jpg", "b.jpg", "deep/er/c.jpg"]
        assert [int(pairs.target(i)[0, 0]) for i in range(3)] == [2, 0, 1]
        assert pairs.read(1)[0] == (root / "images/b.jpg").read_bytes()
    taken = short.take(torch.tensor([2, 0]))
    assert [int(taken.target(i)[0, 0]) for i in range(2)] == [1, 2]
    assert taken.name(0) == short.name(2)


@pytest.mark.parametrize(("kind", "other"), [("images", "mask"), ("masks", "image")])
def test_what_is_alone_is_counted_and_named(tmp_path, kind, other):
    pairs_at(tmp_path, ("a", "b", "c", "d"))
    for name in ("b", "d"):
        next((tmp_path / kind).glob(f"{name}.*")).unlink()
    there = "masks" if kind == "images" else "images"
    with pytest.raises(UserError, match=rf"2 {there} without an? {kind[:-1]}.*{there}/b\."):
        open_pairs(f"pairs:{tmp_path}")


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    pairs_at(tmp_path)
    write(tmp_path / "images/a.png", np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(
        UserError, match=r"images/a\.jpg and .*images/a\.png differ only in their extension"
    ):
        open_pairs(f"pairs:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:{}", "allowed: pairs:IMAGES_FOLDER:MASKS_FOLDER"),
        ("pairs:", "allowed: pairs:"),
        ("pairs:{}/images:", "allowed: pairs:"),
        ("pairs:{}/images:{}/masks:x", "allowed: pairs:"),
        ("pairs:{}/nothing", "nothing/images' does not exist"),
        ("pairs:{}/images:{}/nothing", "nothing' does not exist"),
    ],
)
def test_other_specs_are_refused(tmp_path, spec, message):
    pairs_at(tmp_path)
    with pytest.raises(UserError, match=message):
        open_pairs(spec.replace("{}", str(tmp_path)))


@pytest.mark.parametrize("place", ["", "masks/"])
def test_class_names_are_read_beside_the_masks(tmp_path, place):
    pairs_at(tmp_path)
    assert open_pairs(f"pairs:{tmp_path}").classes is None
    (tmp_path / f"{place}classes.txt").write_text("ground\nbig tree\n")
    pairs = open_pairs(f"pairs:{tmp_path}")
    assert pairs.classes == ("ground", "big tree")
    assert pairs.take(torch.tensor([0])).classes == pairs.classes


@pytest.mark.parametrize("text", ["", "a\n\nb\n", "a\nb\na\n"])
def test_class_names_that_would_mislead_are_refused(tmp_path, text):
    pairs_at(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=r"classes.txt: must have a class name on every line"):
        open_pairs(f"pairs:{tmp_path}")


# --- what a mask holds --------------------------------------------------------------------------

LOSSLESS = {
    "gray": encoded(Image.fromarray(CLASSES)),
    "palette": encoded(as_palette(CLASSES)),
    "palette 4 bits": encoded(as_palette(CLASSES), bits=4),
    "gray 4 bits": gray_png(CLASSES, 4),
    "deep": encoded(Image.fromarray(CLASSES.astype(np.uint16))),
    "tiff": tiff(CLASSES, photometric="minisblack"),
    "deep tiff": tiff(CLASSES.astype(np.uint16), photometric="minisblack"),
    "big-endian tiff": tiff(CLASSES.astype(">u2"), byteorder=">", photometric="minisblack"),
    "palette tiff": encoded(as_palette(CLASSES), "TIFF"),
    "lerc tiff": tiff(CLASSES, photometric="minisblack", compression="lerc"),
    "zstd tiff in tiles": tiff(CLASSES, compression="zstd", tile=(16, 16), predictor=2),
    "jpeg 2000 tiff": tiff(CLASSES, photometric="minisblack", compression="jpeg2000"),
    "tiff of 64 bits": tiff(CLASSES.astype(np.int64)),
    "tiff of 4 bits": tiff(CLASSES, photometric="minisblack", bitspersample=4),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_mask_is_the_files_own_numbers(kind):
    """Palettes are not looked up, few bits not stretched."""
    mask = decode_mask(LOSSLESS[kind], "m.png")
    assert mask.dtype == torch.uint8
    assert torch.equal(mask, torch.from_numpy(CLASSES))


@pytest.mark.parametrize("bits", [1, 2])
def test_masks_of_one_and_two_bits(bits):
    values = CLASSES % 2**bits
    assert torch.equal(decode_mask(gray_png(values, bits), "m.png"), torch.from_numpy(values))


def test_a_mask_of_many_classes_keeps_them():
    values = np.array([[0, 300], [65535, 7]], dtype=np.uint16)
    found = decode_mask(encoded(Image.fromarray(values)), "m.png")
    assert found.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (encoded(Image.new("RGB", (4, 3))), "m has the mode RGB; a mask must have one channel"),
        (encoded(Image.new("RGBA", (4, 3))), "m has the mode RGBA"),
        (encoded(Image.new("LA", (4, 3))), "m has the mode LA"),
        (encoded(Image.new("L", (4, 3)), "JPEG"), "m is a JPEG.*must be PNG or TIFF"),
        (encoded(Image.new("F", (4, 3)), "TIFF"), "m holds float32"),
        (encoded(Image.new("RGB", (4, 3)), "TIFF"), "m has 3 channels"),
        (tiff(CLASSES, photometric="miniswhite"), "m counts from white"),
        (tiff(np.full((3, 4), -5, np.int32)), "m has values from -5 to -5"),
        (tiff(np.full((3, 4), 70000, np.int32)), "m has values from 70000 .* 0 to 65535"),
    ],
)
def test_what_holds_no_classes_is_refused(raw, message):
    with pytest.raises(UserError, match=message):
        decode_mask(raw, "m")


@pytest.mark.parametrize("raw", [b"", b"nothing", LOSSLESS["gray"][:40], LOSSLESS["tiff"][:60]])
def test_a_damaged_mask_is_a_bad_image(raw):
    with pytest.raises(BadImage, match=r"mask some\.png"):
        decode_mask(raw, "some.png")


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (2, 2), (1, 1), (5, 9), (7, 3)])
def test_a_mask_is_resized_by_the_class_at_each_centre(size):
    mask = torch.from_numpy(CLASSES)
    found = nearest_mask(mask, size)
    for i in range(size[0]):
        for j in range(size[1]):
            row, column = int((i + 0.5) * 3 / size[0]), int((j + 0.5) * 4 / size[1])
            assert found[i, j] == mask[row, column]


# --- batches ------------------------------------------------------------------------------------


def test_a_batch_has_whole_images_and_masks_as_they_are(tmp_path):
    """Bright edges of the image are still those of the view: nothing is cropped."""
    image = np.zeros((40, 20, 3), np.uint8)
    image[:, -5:] = 200
    image[:10] = 200
    write(tmp_path / "images/a.png", image)
    write(tmp_path / "images/b.png", np.zeros((12, 30, 3), np.uint8))
    write(tmp_path / "masks/a.png", image[..., 0])
    write(tmp_path / "masks/b.png", np.zeros((12, 30), np.uint8))
    pairs = open_pairs(f"pairs:{tmp_path}")
    batch = PairImages(pairs, (8, 16), 3).__getitems__([0, 1])
    crop = batch.views.crops[0]
    assert crop.shape == (2, 3, 8, 16)
    assert (crop[0, :, :, 13:] > 190).all()
    assert (crop[0, :, 0] > 180).all()
    assert (crop[0, :, 3:, :10] < 10).all()
    assert [tuple(m.shape) for m in batch.masks] == [(40, 20), (12, 30)]
    assert (batch.masks[0] == torch.from_numpy(image[..., 0])).all()
    (found,) = eval_batches(PairImages(pairs, (8, 16), 3), 4, 1, False)
    assert torch.equal(found.views.crops[0], crop)
    assert torch.equal(found.masks[0], batch.masks[0])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_of_any_channels_and_depth(tmp_path, channels, dtype):
    shape = (10, 12) if channels == 1 else (10, 12, channels)
    image = np.full(shape, np.iinfo(dtype).max, dtype)
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images/a.tif", image)
    write(tmp_path / "masks/a.png", np.zeros((10, 12), np.uint8))
    batch = PairImages(open_pairs(f"pairs:{tmp_path}"), (4, 4), channels).__getitems__([0])
    crop = batch.views.crops[0]
    assert crop.shape == (1, channels, 4, 4)
    assert float(crop.max()) == (255 if dtype == np.uint8 else pytest.approx(1))


def test_unreadable_images_and_masks_are_left_out_and_named(tmp_path):
    pairs_at(tmp_path, ("a", "b", "c", "d"))
    (tmp_path / "images/b.jpg").write_bytes(b"no image")
    (tmp_path / "masks/c.png").write_bytes(b"no mask")
    batch = PairImages(open_pairs(f"pairs:{tmp_path}"), (8, 8), 3).__getitems__([0, 1, 2, 3])
    assert batch.views.keys.tolist() == [0, 3]
    assert len(batch.masks) == 2
    assert sorted(batch.bad) == [1, 2]
    assert "b.jpg" in batch.bad[1]
    assert "masks/c.png" in batch.bad[2]
    empty = PairImages(open_pairs(f"pairs:{tmp_path}"), (8, 8), 3).__getitems__([1])
    assert empty.views.crops == []
    assert len(empty.views.keys) == 0


def test_an_image_and_a_mask_of_different_sizes_are_named(tmp_path):
    pairs_at(tmp_path)
    write(tmp_path / "masks/b.png", np.zeros((8, 6), np.uint8))
    images = PairImages(open_pairs(f"pairs:{tmp_path}"), (8, 8), 3)
    with pytest.raises(UserError, match=r"b\.jpg has 6x8 pixels, its mask 8x6"):
        images.__getitems__([0, 1])
