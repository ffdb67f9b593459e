"""Convolutional stem: its layers, what it refuses, and its files."""

import pytest
import torch
from torch.nn import functional as F

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.adapting import adapted
from ssl_vit.weights.exchange import EncoderInfo, load_encoder, save_encoder
from ssl_vit.weights.outgoing import FORMATS

SMALL = {"image_size": (32,), "patch_size": 8, "width": 48, "depth": 2, "heads": 3}


def encoder(channels: int = 3, **changes) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig("vit_tiny_patch16_224", **{"stem": "conv", **SMALL, **changes})
    return Encoder(config, channels).eval()


def test_tokens_by_their_definition():
    """Three convolutions of stride 2, each with a norm over channels and a GELU; a projection."""
    made, images = encoder(), torch.randn(2, 3, 48, 32)
    x = images
    for layer in made.vit.patch_embed.backbone:
        x = F.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=1)
        x = F.layer_norm(x.movedim(1, 3), x.shape[1:2], layer.bn.weight, layer.bn.bias, 1e-5)
        x = F.gelu(x.movedim(3, 1))
    proj = made.vit.patch_embed.proj
    x = torch.einsum("bchw,dc->bhwd", x, proj.weight[:, :, 0, 0]) + proj.bias
    assert [layer.conv.weight.shape[0] for layer in made.vit.patch_embed.backbone] == [12, 24, 48]
    tokens = made.embed(images)
    assert tokens.grid == (6, 4)
    without = tokens.values - made.positions((6, 4))[1]
    torch.testing.assert_close(without, x.flatten(1, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made(images).cls[:1], made(images[:1]).cls)
    torch.testing.assert_close(made(images[..., :32, :]).cls, made.vit(images[..., :32, :]))


def test_patches_cannot_be_hidden():
    made, images = encoder(), torch.randn(2, 3, 32, 32)
    with pytest.raises(UserError, match="methods that hide patches"):
        made.embed(images, keep=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(UserError, match="does not divide into patches of 8"):
        made.embed(images[..., :30])
    with pytest.raises(UserError, match="methods that hide patches"):
        made.embed(images, masked=torch.zeros(2, 16, dtype=torch.bool), token=torch.zeros(48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 12, "image_size": (24,)}, "must be a power of 2"),
        ({"width": 54}, "half of which divides the width"),
        ({"arch": "vit_small_patch16_dinov3", "width": 0, "heads": 0}, "rotary positions"),
    ],
)
def test_what_does_not_fit(changes, message):
    config = {"arch": "vit_tiny_patch16_224", "stem": "conv", **SMALL, **changes}
    with pytest.raises(UserError, match=message):
        Encoder(EncoderConfig(**config))


@pytest.mark.parametrize("changes", [{}, {"image_size": (224,), "patch_size": 16}])
def test_its_file(tmp_path, changes):
    made = encoder(**changes)
    info = EncoderInfo(made.config, 3, IMAGENET_MEAN, IMAGENET_STD, "lejepa", 1)
    save_encoder(tmp_path / "encoder.safetensors", made, info)
    read, found = load_encoder(tmp_path / "encoder.safetensors")
    images = torch.randn(1, 3, *made.image_size)
    assert found == info
    assert torch.equal(read(images).cls, made(images).cls)
    with pytest.raises(UserError, match="no name for a convolutional stem"):
        FORMATS["timm"].usage(tmp_path / "encoder.safetensors", info)


def test_it_begins_from_another():
    """Filters of the first layer for other channels; another kind of stem or patch is refused."""
    given, wanted = encoder(), encoder(channels=1)
    state, notes = adapted(given, wanted, "mean", "given.safetensors")
    wanted.vit.load_state_dict(state)
    gray = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(wanted(gray).cls, given(gray.expand(-1, 3, -1, -1)).cls)
    assert notes == ["filters of 1 channel: mean, all times 3/1"]
    for other in (encoder(stem="patch"), encoder(patch_size=4)):
        with pytest.raises(UserError, match="a stem keeps its kind"):
            adapted(given, other, "mean", "given.safetensors")
