"""Depth maps: what a file's numbers mean, which pixels are valid, the published crops, refusals."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ssl_vit.common.errors import UserError
from ssl_vit.data.decode import BadImage
from ssl_vit.data.depths import crop_mask, decode_depth, in_range, open_depths
from ssl_vit.data.eval_images import eval_batches
from ssl_vit.data.pairs import PairImages

STEPS = np.array([[0, 1, 2], [500, 40_000, 65_535]], dtype=np.uint16)


def png(values: np.ndarray | Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(buffer, kind)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("made", [png, npy, tiff])
def test_integers_are_steps_of_the_scale(made):
    found = decode_depth(made(STEPS), "x", 1 / 256)
    assert found.dtype == torch.float32
    assert found.tolist() == (STEPS / 256).tolist()


@pytest.mark.parametrize("made", [npy, tiff, lambda x: npy(x[None]), lambda x: npy(x[..., None])])
def test_what_is_no_depth_is_zero(made):
    """Not finite, zero, or below; also what a GeoTIFF declares as missing."""
    values = np.array([[1.5, 0.0, -1.0], [np.nan, np.inf, 1e-3]], dtype=np.float32)
    wanted = [[3.0, 0.0, 0.0], [0.0, 0.0, 2 * float(np.float32(1e-3))]]
    assert decode_depth(made(values), "x", 2.0).tolist() == wanted
    marked = tiff(STEPS, extratags=[(42113, "s", 0, "65535", True)])
    assert decode_depth(marked, "x", 1.0).tolist() == [[0, 1, 2], [500, 40_000, 0]]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (png(np.zeros((2, 3), np.uint8), "JPEG"), "x is a JPEG file; a depth map must be PNG"),
        (png(np.zeros((2, 3, 3), np.uint8)), "x has the mode RGB; a depth map must have one"),
        (png(Image.new("P", (3, 2))), "x has the mode P; a depth map must have one channel"),
        (npy(np.zeros((2, 3, 3))), "x has the shape 2x3x3; a depth map must have one channel"),
        (npy(np.zeros((2, 3), complex)), "x holds complex128; a depth map must have"),
        (tiff(np.zeros((2, 3, 3), np.uint8)), "x has 3 channels in 1 planes; a depth map must"),
    ],
)
def test_other_files_are_refused_in_one_line(raw, message):
    with pytest.raises(UserError, match=message) as error:
        decode_depth(raw, "x", 1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [b"", b"no map", png(STEPS)[:-30], npy(STEPS)[:-2]])
def test_a_damaged_map_is_a_bad_image(raw):
    with pytest.raises(BadImage, match="depth map x: "):
        decode_depth(raw, "x", 1.0)


def folders(root: Path, names=("a", "b"), size=(4, 6)) -> Path:
    for i, name in enumerate(names):
        for folder in ("images", "depth"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), 50 * i, np.uint8)).save(root / f"images/{name}.jpg")
        Image.fromarray(np.full(size, 1000 * i, np.uint16)).save(root / f"depth/{name}.png")
    return root


def test_images_and_maps_are_paired_by_their_names(tmp_path):
    root = folders(tmp_path)
    for spec in (f"depth:{root}", f"depth:{root}/images:{root}/depth"):
        pairs = open_depths(spec, scale=0.001)
        assert [float(pairs.target(i)[0, 0]) for i in range(2)] == [0, 1]
        taken = pairs.take(torch.tensor([1]))
        assert float(taken.target(0)[0, 0]) == 1
        assert taken.name(0) == pairs.name(1)


@pytest.mark.parametrize(
    ("change", "spec", "message"),
    [
        ("", "pairs:{}", "names no images with depth maps; allowed: depth:IMAGES_FOLDER:DEPTH_"),
        ("images/a.jpg", "depth:{}", r"1 depth maps without an image .*/depth/a\.png"),
        ("depth/b.png", "depth:{}", r"1 images without a depth map .*/images/b\.jpg"),
    ],
)
def test_pairs_that_are_none_are_refused(tmp_path, change, spec, message):
    root = folders(tmp_path)
    if change:
        (root / change).unlink()
    with pytest.raises(UserError, match=message):
        open_depths(spec.format(root))


def test_an_image_and_its_map_must_agree_in_size(tmp_path):
    root = folders(tmp_path)
    Image.fromarray(np.ones((4, 5), np.uint16)).save(root / "depth/b.png")
    images = PairImages(open_depths(f"depth:{root}"), (4, 4), 3)
    with pytest.raises(UserError, match=r"b\.jpg has 4x6 pixels, its depth map 4x5 .rows x"):
        list(eval_batches(images, 2, 0, False))


def test_a_pixel_is_valid_within_the_range_ends_included():
    depth = torch.tensor([0.0, 0.5, 1.0, 2.0, 2.5])
    assert in_range(depth, 1.0, 2.0).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("crop", "size", "rows", "columns"),
    [
        # int(share * length), by hand, of KITTI's most frequent size.
        ("eigen", (375, 1242), (124, 342), (44, 1197)),
        ("garg", (375, 1242), (153, 371), (44, 1197)),
        ("nyu", (480, 640), (45, 471), (41, 601)),
        ("none", (5, 7), (0, 5), (0, 7)),
    ],
)
def test_crops_are_the_published_ones(crop, size, rows, columns):
    scored = crop_mask(crop, size, "x")
    assert scored.any(1).nonzero()[[0, -1], 0].tolist() == [rows[0], rows[1] - 1]
    assert scored.any(0).nonzero()[[0, -1], 0].tolist() == [columns[0], columns[1] - 1]
    assert int(scored.sum()) == (rows[1] - rows[0]) * (columns[1] - columns[0])


def test_a_crop_in_pixels_is_refused_for_other_sizes():
    with pytest.raises(
        UserError, match=r"--crop nyu is for maps of 480 x 640 .*of x has 240 x 320"
    ):
        crop_mask("nyu", (240, 320), "x")
