"""Feature maps: shapes as told, values those of the networks' own stages, gradients through."""

from typing import Any

import pytest
import timm
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.evaluators.maps import FeatureMaps
from ssl_vit.model.encoder import Encoder

OTHERS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64},
    "mobilenetv3_small_050": {},
}


def encoder(depth: int = 4) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig("vit_tiny_patch16_224", depth=depth, image_size=(32,), patch_size=8)
    return Encoder(config).eval()


@pytest.mark.parametrize("name", OTHERS)
def test_stages_of_other_networks_are_as_told(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **OTHERS[name]).eval()
    maps = FeatureMaps(network, 4)
    images = torch.randn(2, 3, 64, 64)
    made = maps(images)
    assert maps.strides == (4, 8, 16, 32)
    assert [m.shape for m in made] == [
        (2, width, 64 // stride, 64 // stride)
        for width, stride in zip(maps.widths, maps.strides, strict=True)
    ]
    (last,) = FeatureMaps(network, 1)(images)
    torch.testing.assert_close(last, made[-1])
    with pytest.raises(UserError, match="9 feature maps asked; the network has"):
        FeatureMaps(network, 9)


def test_the_last_map_pooled_is_the_pooled_feature():
    """ResNet pools its last stage and nothing else."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(FeatureMaps(network)(images)[0].mean((2, 3)), network(images))


def test_maps_of_a_plain_vit_are_its_patch_tokens():
    made = encoder()
    images = torch.randn(2, 3, 24, 40)
    (last,) = FeatureMaps(made)(images)
    patches = made(images).patches
    assert last.shape == (2, 192, 3, 5)
    for row in range(3):
        for column in range(5):
            torch.testing.assert_close(last[:, :, row, column], patches[:, 5 * row + column])


@pytest.mark.parametrize(("count", "spread", "at"), [(2, False, (2, 3)), (2, True, (1, 3))])
def test_blocks_are_the_last_or_spread_over_the_depth(count, spread, at):
    made = encoder()
    images = torch.randn(1, 3, 32, 32)
    maps = FeatureMaps(made, count, spread)(images)
    every = made.intermediate(images, last=4)
    for found, place in zip(maps, at, strict=True):
        torch.testing.assert_close(found.flatten(2).mT, every[place].patches)


def test_four_of_twelve_blocks_are_those_that_dpt_reads():
    assert FeatureMaps(encoder(12), 4, spread=True)._at == [2, 5, 8, 11]


def test_blocks_of_sam_are_before_its_neck():
    torch.manual_seed(0)
    network = timm.create_model(
        "samvit_base_patch16", num_classes=0, img_size=64, depth=2, embed_dim=96, num_heads=2
    ).eval()
    maps = FeatureMaps(network, 2)
    assert maps.widths == (96, 96)
    assert maps.strides == (16, 16)
    assert [m.shape for m in maps(torch.randn(1, 3, 64, 64))] == [(1, 96, 4, 4)] * 2


def test_gradients_reach_the_encoder():
    made = encoder()
    FeatureMaps(made, 2, spread=True)(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert made.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert made.vit.blocks[3].attn.qkv.weight.grad is None
