"""The picture door: attention maps as a PNG, and a user's mistakes in one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.attention import cls_attention
from ssl_vit.config import EncoderConfig, UserError
from ssl_vit.encoder import Encoder
from ssl_vit.visualize import main
from ssl_vit.weights.exchange import EncoderInfo, save_encoder

SMALL = {"image_size": (16, 24), "patch_size": 4, "width": 32, "depth": 2, "heads": 2}
ATTENTION = ("-m", "ssl_vit.visualize", "attention")
GOOD = {"--encoder": ("run",), "--images": ("photos/a.png",), "--out": ("refused.png",)}
CELL = 96  # 16 pixels are enlarged six times, 24 to 144


def write_encoder(path, channels=3, arch="vit_tiny_patch16_224"):
    torch.manual_seed(0)
    config = EncoderConfig(arch=arch, **SMALL)
    encoder = Encoder(config, channels).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    info = EncoderInfo(config, channels, (0.5,) * channels, (0.25,) * channels, "mae", 7)
    path.parent.mkdir(exist_ok=True)
    save_encoder(path, encoder, info)
    return encoder


def refused(result, *fragments):
    """One line that says so, no traceback, status 2; lines before it report what went well."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    *before, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert all("tensors" in line for line in before)
    for fragment in fragments:
        assert fragment in last
    assert not result.stdout


@pytest.fixture(scope="module")
def room(shared_door):
    """A run folder with an encoder, two photographs, a torn one and a 16-bit one."""
    folder = shared_door.folder
    shared_door.encoder = write_encoder(folder / "run" / "encoder.safetensors")
    write_encoder(folder / "gray" / "encoder.safetensors", channels=1)
    write_encoder(folder / "nocls" / "encoder.safetensors", arch="vit_base_patch16_siglip_224")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for name in ("a.png", "b.png"):
        array = rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / "photos" / name)
    Image.fromarray(array).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    deep = rng.integers(900, 1100, (20, 30), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return shared_door


def flags(options):
    return [part for name, values in options.items() for part in (name, *values)]


def cell(picture, row, column):
    """A cell of a sheet whose images have one line each."""
    y, x = 16 + row * (CELL + 4), 4 + column * (CELL * 3 // 2 + 4)
    return picture[y : y + CELL, x : x + CELL * 3 // 2]


def test_files(room):
    result = room(*ATTENTION, "--encoder", "run", "--images", "photos/a.png", "photos/b.png")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "attention of 2 images: run/attention-images.png\n"
    assert "tensors, mae at step 7" in result.stderr
    out = room.folder / "run" / "attention-images.png"
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "attention-images.png",
        "encoder.safetensors",
    ]
    with Image.open(out) as image:
        assert image.format == "PNG"
        picture = np.asarray(image)
    assert picture.shape[1] == 6 * (CELL * 3 // 2 + 4) + 4
    for row, name in enumerate(("a.png", "b.png")):
        photo = np.asarray(Image.open(room.folder / "photos" / name))
        shown = cell(picture, row, 0)[3::6, 3::6].astype(int)
        assert np.abs(shown - photo).max() <= 1
        x = (torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        with torch.no_grad():
            attention, grid = cls_attention(room.encoder, x)
        for head in range(2):
            middle = cell(picture, row, 4 + head)[12::24, 12::24].astype(int).sum(-1)
            most = int(attention[0, head].argmax())
            assert middle.shape == grid
            assert middle.flatten()[most] == middle.max()
    before = out.read_bytes()
    room(*ATTENTION, "--encoder", "run", "--images", "photos/a.png", "photos/b.png")
    assert out.read_bytes() == before


def test_source_count_size_random_and_yaml(room):
    (room.folder / "look.yaml").write_text(
        "encoder: random:gray/encoder.safetensors\nimages: ['digits:val']\nsize: [32]\ncount: 3\n"
    )
    result = room(*ATTENTION, "--config", "look.yaml", "--mass", "0.9")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "attention of 3 images: gray/random-gray-attention-images.png\n"
    with Image.open(room.folder / "gray" / "random-gray-attention-images.png") as image:
        assert image.width == 6 * (CELL + 4) + 4
        assert image.height > 3 * (CELL + 4)


def test_deep_images_are_shown_around_the_mean(room):
    options = ("--encoder", "gray/encoder.safetensors", "--images", "deep.png")
    result = room(*ATTENTION, *options, "--out", "deep-shown.png")
    assert result.returncode == 0, result.stderr
    # All values lie two standard deviations below this encoder's mean, of 0.5 +- 0.25.
    shown = cell(np.asarray(Image.open(room.folder / "deep-shown.png")), 0, 0)
    assert 10 < shown.mean() < 50


def test_unreadable_images_of_a_folder_are_left_out_and_named(room):
    folder = room.folder / "mixed"
    folder.mkdir()
    for name in ("torn.jpg", "photos/a.png"):
        (folder / name.split("/")[-1]).write_bytes((room.folder / name).read_bytes())
    options = ("--encoder", "run", "--images", "flat:mixed", "--out", "mixed.png")
    result = room(*ATTENTION, *options)
    assert result.returncode == 0, result.stderr
    assert "torn.jpg" in result.stderr
    assert "attention of 1 images" in result.stdout


def test_help(room):
    result = room(*ATTENTION, "--help")
    assert result.returncode == 0
    for option in ("--encoder", "--images", "--count", "--size", "--mass", "--out", "--seed"):
        assert option in result.stdout
    short = room("-m", "ssl_vit.visualize", "--help")
    assert short.returncode == 0
    assert "attention" in short.stdout


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--encoder", ""), ("--encoder is missing",)),
        (("--encoder", "nowhere"), ("--encoder is 'nowhere'",)),
        (("--encoder", "nocls"), ("[CLS]",)),
        (("--images",), ("--images is missing",)),
        (("--images", "nowhere.png"), ("'nowhere.png'", "digits", "no", "such a file")),
        (("--images", "photos"), ("'photos'", "folder:photos")),
        (("--images", "folder:nowhere"), ("nowhere",)),
        (("--images", "photos/a.png", "c.png"), ("'c.png'",)),
        (("--images", "photos/a.png", "digits"), ("'digits'", "one source")),
        (("--images", "photos/a.png", "torn.jpg"), ("torn.jpg", "truncated")),
        (("--size", "18"), ("--size is 18x18", "patch size, 4")),
        (("--size", "16", "16", "16"), ("--size is 16 16 16", "one number")),
        (("--size", "-4"), ("--size is -4",)),
        (("--size", "big"), ("--size", "big")),
        (("--mass", "0"), ("--mass is 0.0", "at most 1")),
        (("--mass", "60"), ("--mass is 60.0", "at most 1")),
        (("--count", "0"), ("--count is 0", "at least 1")),
        (("--out", "picture.jpg"), ("picture.jpg", ".png")),
        (("--out", "nowhere/picture.png"), ("no folder 'nowhere'",)),
        (("--device", "cuda:99"), ("cuda:99",)),
        (("--imags", "x"), ("--imags", "--images")),
    ],
)
def test_refusals(room, monkeypatch, options, fragments):
    """In this process, which is faster than 20 new ones."""
    monkeypatch.chdir(room.folder)
    given = GOOD | {options[0]: options[1:]}
    with pytest.raises(UserError) as refusal:
        main(["attention", *flags(given)])
    message = str(refusal.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert not (room.folder / "refused.png").exists()


def test_refusals_at_the_door(room):
    torn = GOOD | {"--images": ("photos/a.png", "torn.jpg")}
    refused(room(*ATTENTION, *flags(torn)), "torn.jpg", "truncated")
    refused(room(*ATTENTION, *flags(GOOD | {"--size": ("18",)})), "--size is 18x18")
    assert not (room.folder / "refused.png").exists()
    assert not list(room.folder.glob(".*.partial"))


def test_other_pictures_are_refused(room):
    refused(room("-m", "ssl_vit.visualize", "atention"), "'atention'", "attention")
    refused(room("-m", "ssl_vit.visualize"), "PICTURE", "attention")
