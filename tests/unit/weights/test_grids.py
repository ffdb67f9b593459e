"""Grids of positions: read where something is certain, else as asked, else said to be assumed."""

import argparse

import pytest
import timm
import torch

from ssl_vit.export import main as export
from ssl_vit.model.positions import sincos_positions
from ssl_vit.weights.exchange import read_info
from ssl_vit.weights.official import open_weights, weights_info
from tests.unit.foreign_weights import agree, images, noisy, refused, saved

WIDE = (16, 64)  # as many patches of 8 pixels as 32 x 32 has


def network(size, **kwargs):
    return noisy(timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, depth=1,
                                   num_classes=0, **kwargs))  # fmt: skip


def mae(size, tmp_path, **extra):
    """A file of MAE's, which has nothing of its images' size but what ``extra`` says."""
    model = network(size)
    state = model.state_dict() | {"mask_token": torch.zeros(1, 1, 192)}
    return model, saved({"model": state, **extra}, tmp_path)


def test_a_square_is_assumed_in_words(tmp_path):
    _, path = mae(WIDE, tmp_path)
    opened = open_weights(path)
    assert opened.encoder.image_size == (32, 32)
    assert "a square grid of 4x4 patches is assumed; --encoder.image-size 16 64 " in opened.report


@pytest.mark.parametrize("size", [WIDE, (64, 16), (16, 32)])
def test_the_size_that_is_given_is_the_files(tmp_path, size):
    """Where the file does not say: also of a number of patches that is no square."""
    model, path = mae(size, tmp_path)
    opened = open_weights(path, size)
    agree(opened, model.forward_features(images(size)), size)
    n, rows, columns = len(model.pos_embed[0]) - 1, size[0] // 8, size[1] // 8
    assert f"{n} positions are {rows}x{columns}, by the size given" in opened.report
    assert weights_info(path, size)[0] == opened.info
    if n != 16:
        message = "has 8 positions for patches; not a square grid: .* --encoder.image-size 16 32"
        refused(path, message)
        with pytest.raises(Exception, match=message):
            open_weights(path, (24, 24))


@pytest.mark.parametrize("size", [(24, 24), (24,), (64, 64)])
def test_a_size_of_other_patches_is_no_matter_of_the_file(tmp_path, size):
    """As where images of another size are to be evaluated."""
    _, path = mae((32, 32), tmp_path)
    opened = open_weights(path, size)
    assert opened.encoder.image_size == (32, 32)
    assert "is assumed" in opened.report


@pytest.mark.parametrize("value", [[16, 64], (3, 16, 64)])
def test_the_options_of_the_training_tell_it(tmp_path, value):
    model, path = mae(WIDE, tmp_path, args=argparse.Namespace(input_size=value))
    opened = open_weights(path, (32, 32))
    agree(opened, model.forward_features(images(WIDE)), WIDE)
    assert opened.report.endswith("left out: mask_token 1")


@pytest.mark.parametrize(("options", "said"), [(32, ""), (224, "is assumed"), ("32", "is assumed")])
def test_a_square_that_the_options_tell_is_not_assumed(tmp_path, options, said):
    """Of the official MAE: ``input_size`` is one number; one that fits another network is not."""
    _, path = mae((32, 32), tmp_path, args={"input_size": options})
    opened = open_weights(path, WIDE if not said else ())
    assert opened.encoder.image_size == (32, 32)
    assert said in opened.report if said else "grid" not in opened.report


@pytest.mark.parametrize("size", [WIDE, (64, 16), (32, 32), (16, 48), (8, 128)])
def test_sine_cosine_positions_tell_it_themselves(tmp_path, size):
    """MAE's: no two grids have the same values."""
    model = network(size)
    grid = (size[0] // 8, size[1] // 8)
    with torch.no_grad():
        model.pos_embed[0, 0] = 0
        model.pos_embed[0, 1:] = sincos_positions(grid, 192)
    path = saved({"model": model.state_dict()}, tmp_path)
    opened = open_weights(path, (32, 32))
    agree(opened, model.forward_features(images(size)), size)
    assert opened.info.config.positions == "sincos"
    assert opened.report.endswith("tensors")


def test_formats_of_squares_alone_are_not_asked(tmp_path):
    """DINO's own code takes the square root; so a size that is given is the images'."""
    model = network((32, 32))
    teacher = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    opened = open_weights(saved({"teacher": teacher}, tmp_path), WIDE)
    assert opened.encoder.image_size == (32, 32)
    assert "grid" not in opened.report


def test_an_architecture_by_name_has_its_grid(tmp_path):
    model = noisy(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0))
    path = saved(model.state_dict(), tmp_path)
    opened = open_weights(f"timm:vit_tiny_patch16_224:{path}", (112, 448))
    assert opened.encoder.image_size == (224, 224)
    assert "grid" not in opened.report
    assert open_weights(path, (112, 448)).encoder.image_size == (112, 448)


def test_without_positions_for_cls(tmp_path):
    """Registers: the table is of patches alone; 20 of them, no square."""
    kwargs = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    model = network((32, 40), **kwargs)
    path = saved(model.state_dict(), tmp_path)
    opened = open_weights(path, (32, 40))
    agree(opened, model.forward_features(images((32, 40))), (32, 40), prefix=5)


def test_export_takes_the_size(tmp_path, capsys):
    _, path = mae((16, 32), tmp_path)
    out = tmp_path / "ours.safetensors"
    flags = ["--encoder", str(path), "--to", "safetensors", "--out", str(out)]
    assert export([*flags, "--size", "16", "32"]) == 0
    assert read_info(out).config.image_size == (16, 32)
