"""Dense fine-tuning: rates by layer, and which weights are trained at all."""

import pytest
import timm
import torch
from torch import nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.evaluators.dense_tune import DenseNetwork, DenseTune, train_what_counts, trainable
from ssl_vit.evaluators.maps import FeatureMaps
from ssl_vit.model.encoder import Encoder


def network_of(module: nn.Module, count: int = 1) -> DenseNetwork:
    maps = FeatureMaps(module, count)
    head = nn.Conv2d(maps.widths[-1], 5, 1)
    return DenseNetwork(maps, head, lambda made: made[-1])


def vit() -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig("vit_tiny_patch16_224", depth=3, image_size=(32,), patch_size=8)
    return Encoder(config)


def task_of(network: DenseNetwork) -> DenseTune:
    return DenseTune(network, lambda made, target: {"loss": made.sum()}, 0.5)


def test_rates_fall_from_the_head_to_the_patches():
    """The head is a layer of its own: the last block has the decay, not the whole rate."""
    task = task_of(network_of(vit()))
    scales = {
        name.removeprefix("network."): task.lr_scale(name) for name, _ in task.named_parameters()
    }
    start = "maps.network.vit."
    assert scales["head.weight"] == 1
    assert scales[f"{start}norm.weight"] == 1
    assert [scales[f"{start}blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert scales[f"{start}patch_embed.proj.weight"] == scales[f"{start}pos_embed"] == 0.0625


def test_of_other_networks_too():
    task = task_of(network_of(timm.create_model("resnet18", num_classes=0)))
    start = "network.maps.network."
    assert task.lr_scale(f"{start}layer4.1.conv2.weight") == 0.5
    assert task.lr_scale(f"{start}conv1.weight") < 0.01
    assert task.place_of(f"{start}conv1.weight").encoder
    assert not task.place_of("network.head.weight").encoder


def test_tokens_and_positions_are_not_decayed():
    task = task_of(network_of(vit()))
    named = dict(task.named_parameters())
    start = "network.maps.network.vit."
    assert task.decays(f"{start}blocks.0.mlp.fc1.weight", named[f"{start}blocks.0.mlp.fc1.weight"])
    for name in ("pos_embed", "cls_token", "norm.weight"):
        assert not task.decays(f"{start}{name}", named[f"{start}{name}"])


def test_weights_without_part_in_the_maps_are_not_trained():
    network = network_of(timm.create_model("convnext_atto", num_classes=0))
    train_what_counts(network, (64, 64), 3)
    left = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert left == ["maps.network.head.norm.weight", "maps.network.head.norm.bias"]
    network(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_a_size_that_does_not_fit_is_told():
    network = network_of(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0))
    with pytest.raises(
        UserError, match=r"images of 100x100 do not fit: .*another --tune\.image-size"
    ):
        train_what_counts(network, (100, 100), 3)


def test_stochastic_depth_keeps_the_weights():
    old = vit()
    new = trainable(old, 0.3)
    assert new is not old
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert new.config.drop_path == 0.3
    assert trainable(old, 0.0) is old
