"""Crops from JPEGs decoded at reduced size: the same boxes, nearly the same values, every file."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data import reduced as module
from ssl_vit.data.augment import Crop, ViewSpec, draw_views, resized, take_views
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.photometric import Photometric
from ssl_vit.data.policy import Policy
from ssl_vit.data.reduced import GAP, decode_reduced, reduction, views_of

HEIGHT, WIDTH = 743, 1117  # of a prime number of pixels each: no reduction divides them
COLOUR = Photometric(jitter=0.8, gray=0.2, blur=0.5, solarize=0.2)
SPEC = ViewSpec(
    (
        Crop((48, 48), scale=(0.4, 1.0), photometric=COLOUR, policy=Policy("rand-m9", (0.5,) * 3)),
        Crop((32, 24), scale=(0.12, 0.3), count=3, photometric=COLOUR),
    )
)


def photograph(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth and sharp parts with details of every size, and noise as of a camera."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (2, 7, 23, 71, 223):
        coarse = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        planes = [
            Image.fromarray(coarse[..., i]).resize((width, height), Image.Resampling.BICUBIC)
            for i in range(3)
        ]
        image += np.stack([np.asarray(plane) for plane in planes], -1) / cells**0.5
    image = 128 + 40 * image + rng.normal(size=image.shape) * 3
    image[height // 3 : height // 2, width // 4 : width // 2] = 255
    return image.clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray | Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return photograph()


@pytest.fixture
def reductions(monkeypatch) -> list[int]:
    """By how much each image was reduced that came out of ``decode_reduced``."""
    found: list[int] = []

    def listening(raw, channels, size, by):
        image = decode_reduced(raw, channels, size, by)
        found.extend([by] if image is not None else [])
        return image

    monkeypatch.setattr(module, "decode_reduced", listening)
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Mean absolute difference in gray levels, and the peak signal to noise ratio in dB."""
    off = a.float() - b.float()
    return off.abs().mean().item(), 10 * np.log10(255**2 / max(1e-9, off.square().mean().item()))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_reduced_image_is_the_image_at_that_size(picture, channels, options):
    """Against bicubic resizing of the whole, by which a crop's own pixels are made after that."""
    raw = jpeg(picture, **options)
    for by in (2, 4, 8):
        small = decode_reduced(raw, channels, (HEIGHT, WIDTH), by)
        assert small.shape == (channels, -(-HEIGHT // by), -(-WIDTH // by))
        assert small.dtype == torch.uint8
        # What lies beyond the last whole block is left out on both sides.
        h, w = HEIGHT // by - 8, WIDTH // by - 8
        whole = resized(decode(raw, channels)[:, : h * by, : w * by], (h, w))
        assert apart(small[:, :h, :w], whole)[0] < 4
        size = h // GAP, w // GAP
        levels, ratio = apart(resized(small[:, :h, :w], size), resized(whole, size))
        assert levels < 1
        assert ratio > 43


def test_the_largest_faithful_reduction_is_taken():
    crop = Crop((50, 40))

    def by(*boxes: tuple[int, int]) -> int:
        cut = draw_views(999, 999, ViewSpec((crop,)), random.Random(0), policies=False)[0][0]
        cuts = [cut._replace(box=(0, 0, *box)) for box in boxes]
        return reduction(ViewSpec((crop,)), [cuts])

    for factor in (2, 4, 8):
        enough = 50 * GAP * factor, 40 * GAP * factor
        assert by(enough) == factor
        assert by(enough, (9999, 9999)) == factor
        assert by((9999, 9999), (enough[0] - 1, enough[1])) == factor // 2
        assert by((enough[0], enough[1] - 1)) == factor // 2
    assert by((10, 10)) == 1
    assert by((9999, 9999)) == 8


def test_crops_are_those_of_the_whole_image(picture, reductions):
    """The same draws, boxes within half a reduced pixel, flips and parameters; without a policy."""
    local = Crop((32, 24), (0.04, 0.3), count=3, photometric=COLOUR)
    plain = ViewSpec((Crop((48, 48), (0.6, 1.0), count=3, photometric=COLOUR), local))
    raw = jpeg(picture)
    flips = 0
    for key in range(12):
        ours = views_of(raw, 3, plain, key)
        whole = take_views(decode(raw, 3), plain, random.Random(key))
        for kind, same in zip(ours, whole, strict=True):
            for (crop, drawn, place, _), (expected, theirs, box, _) in zip(kind, same, strict=True):
                assert drawn == theirs
                assert place == box
                assert crop.dtype == torch.uint8
                assert apart(crop, expected)[1] > 28  # the box may be a quarter of a pixel off
                flips += apart(crop.flip(-1), expected)[1] < 28
    assert flips > 12 * 6 * 0.9  # some crops hardly tell left from right
    assert set(reductions) == {2, 4}


def test_a_policy_draws_alike(picture, reductions):
    """What follows a policy's key from the same generator is the same."""
    raw = jpeg(picture)
    ours = views_of(raw, 3, SPEC, 5)
    whole = take_views(decode(raw, 3), SPEC, random.Random(5))
    assert reductions
    drawn = [[d for _, *d in kind] for kind in ours]
    assert drawn == [[d for _, *d in kind] for kind in whole]
    assert apart(ours[0][0][0], whole[0][0][0])[0] < 12


def test_shrunk_boxes_cover_what_they_did():
    """Edges at the nearest pixel of the reduced image, at most half of one away; never outside."""
    for key in range(300):
        for cut in draw_views(HEIGHT, WIDTH, SPEC, random.Random(key), policies=True)[1]:
            for by in (2, 4, 8):
                top, left, h, w = module._shrunk(cut, by).box
                edges = np.array([top, left, top + h, left + w])
                before = np.array([*cut.box[:2], *np.add(cut.box[:2], cut.box[2:])])
                assert np.abs(edges - before / by).max() <= 0.5
                assert edges.min() >= 0
                assert edges[2] <= -(-HEIGHT // by)
                assert edges[3] <= -(-WIDTH // by)


def test_photographs_of_the_usual_size_are_decoded_whole(reductions):
    """Bit for bit, by the crops of the paper's recipes."""
    raw, spec = (
        jpeg(photograph(375, 500)),
        ViewSpec((Crop((224, 224)), Crop((96, 96), (0.05, 0.4)))),
    )
    for key in range(5):
        whole = take_views(decode(raw, 3), spec, random.Random(key))
        for kind, same in zip(views_of(raw, 3, spec, key), whole, strict=True):
            assert torch.equal(kind[0][0], same[0][0])
    assert reductions == []


def with_size(raw: bytes, height: int, width: int) -> bytes:
    """The same file whose header tells of another size."""
    at = next(raw.index(m) for m in (b"\xff\xc0", b"\xff\xc2") if m in raw) + 5
    return raw[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + raw[at + 4 :]


def test_uncommon_files_are_what_they_are_by_full_decoding(picture, reductions):
    """Gray, with EXIF (a turned image, a thumbnail in it), CMYK, PNG; one channel or three."""
    exif = Image.Exif()
    exif[0x0112] = 6
    thumbnail = jpeg(picture[:48, :64])
    files = {
        "gray": (jpeg(picture[..., 0]), True),
        "exif": (jpeg(picture, exif=exif.tobytes() + thumbnail), True),
        "cmyk": (jpeg(Image.fromarray(picture).convert("CMYK")), False),
    }
    assert views_of(files["cmyk"][0], 4, SPEC, 1)[1][0][0].shape == (4, 32, 24)
    with pytest.raises(BadImage, match="channels"):
        views_of(files["exif"][0], 2, SPEC, 1)
    for raw, reducible in files.values():
        for channels in (1, 3):
            reductions.clear()
            ours = views_of(raw, channels, SPEC, 1)[1]
            whole = take_views(decode(raw, channels), SPEC, random.Random(1))[1]
            assert bool(reductions) == reducible
            for (crop, *_), (expected, *_) in zip(ours, whole, strict=True):
                assert crop.shape == expected.shape == (channels, 32, 24)
                assert apart(crop, expected)[1] > (28 if reducible else 99)


def test_broken_files_are_bad_as_by_full_decoding(picture, reductions):
    """Cut anywhere, or with a header that asks for more memory than an image may have."""
    for options in ({}, {"progressive": True}):
        raw = jpeg(picture, **options)
        for share in (0.01, 0.3, 0.9, 0.999):
            with pytest.raises(BadImage):
                views_of(raw[: int(len(raw) * share)], 3, SPEC, 0)
        with pytest.raises(BadImage, match="too large"):
            views_of(with_size(raw, 60_000, 60_000), 3, SPEC, 0)
    assert reductions == []


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("size", [(HEIGHT * 2, WIDTH), (HEIGHT, WIDTH // 2), (HEIGHT - 90, WIDTH)])
def test_a_header_of_another_size_ends_as_by_full_decoding(picture, options, size):
    raw = with_size(jpeg(picture, **options), *size)
    try:
        whole = take_views(decode(raw, 3), SPEC, random.Random(0))
    except BadImage:
        with pytest.raises(BadImage):
            views_of(raw, 3, SPEC, 0)
        return
    for (crop, *_), (expected, *_) in zip(views_of(raw, 3, SPEC, 0)[1], whole[1], strict=True):
        assert apart(crop, expected)[1] > 24


def test_a_second_frame_of_another_size_is_not_taken_for_the_first():
    """What Pillow says of an image must be what its header does; else it is decoded in full."""
    raw = jpeg(photograph(96, 128))
    assert decode_reduced(raw, 3, (96, 128), 2).shape == (3, 48, 64)
    for size in ((96, 129), (192, 256), (128, 96)):
        assert decode_reduced(raw, 3, size, 2) is None
    assert decode_reduced(b"\xff\xd8 no image", 3, (96, 128), 2) is None
