"""Files of timm and ours, and timm's own weights by name."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from ssl_vit.common.config import EncoderConfig
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from ssl_vit.weights.official import open_weights, weights_info
from tests.unit.foreign_weights import (
    IMAGENET,
    SQUARE,
    TINY_CONFIG,
    agree,
    counted,
    images,
    noisy,
    refused,
    saved,
    vit,
)


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("channels", [3, 5])
def test_timm_files(tmp_path, wrapper, prefix, channels):
    model = vit(num_classes=7, in_chans=channels)
    state = {f"{prefix}{k}": v for k, v in model.state_dict().items()}
    opened = open_weights(saved({wrapper: state} if wrapper else state, tmp_path))
    agree(opened, model.forward_features(images(channels=channels)))
    assert opened.format == "timm"
    statistics = IMAGENET if channels == 3 else ((0.5,) * 5, (0.5,) * 5)
    config = replace(TINY_CONFIG, resampling="timm")
    assert opened.info == EncoderInfo(config, channels, *statistics)
    assumed = f"; mean {statistics[0]} and deviation {statistics[1]} are assumed"
    assert opened.report == counted(opened) + f"; left out: head 2{SQUARE}{assumed}"


def test_timm_safetensors_and_half_precision(tmp_path):
    """Weights are float32 whatever the file has."""
    model = vit(num_classes=7).half().float()
    save_file({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "a.safetensors")
    agree(open_weights(tmp_path / "a.safetensors"), model.forward_features(images()))


@pytest.mark.parametrize(
    ("arch", "tag"), [("vit_base_patch16_clip_224", ".openai"), ("vit_base_patch16_siglip_224", "")]
)
def test_timm_by_name(tmp_path, arch, tag):
    """What plain shapes do not tell, an architecture's name does; without it, one line says so."""
    model = vit(arch, embed_dim=192, num_heads=3, num_classes=0)
    path = saved(model.state_dict(), tmp_path)
    opened = open_weights(f"timm:{arch}{tag}:{path}")
    tokens = model.forward_features(images())
    features = opened.encoder(images())
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(features.patches, tokens[:, prefix:], atol=1e-5, rtol=1e-5)
    assert opened.info.config.arch == arch
    cfg = timm.get_pretrained_cfg(arch + tag)
    assert (opened.info.mean, opened.info.std) == (cfg.mean, cfg.std)
    assert opened.report == counted(opened) + SQUARE
    refused(path, rf"named?.* timm:NAME:{path}")


def test_folder_of_timm(tmp_path):
    """As timm publishes them: config.json names the architecture."""
    model = vit("vit_base_patch16_clip_224", embed_dim=192, num_heads=3, num_classes=5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    agree(open_weights(tmp_path), model.forward_features(images()))


def test_heads_that_no_shape_tells(tmp_path):
    refused(saved(vit(embed_dim=48).state_dict(), tmp_path), "width is 48, whose .* heads are unkn")


def test_timm_pretrained_needs_no_download_for_its_architecture():
    info, path = weights_info("timm:vit_small_patch14_reg4_dinov2.lvd142m")
    config = EncoderConfig("vit_small_patch14_reg4_dinov2", resampling="timm")
    assert (info, path) == (EncoderInfo(config, 3, *IMAGENET), None)
    assert weights_info("timm:vit_base_patch16_224")[0].mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet50", "'resnet50' is not a plain ViT of timm"),
        ("timm:vit_tiny_patch16_22", "nearest known: vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.nobody", r"vit_tiny_patch16_224.nobody: .*tag"),
        ("timm:vit_gigantic_patch14_224", "timm has no weights of that name"),
        ("timm:", "'' is not a plain ViT of timm"),
        ("timm:vit_tiny_patch16_224:/nowhere/x.pth", "no such file, nor a folder with"),
        ("/nowhere/x.pth", "--encoder is '/nowhere/x.pth'; no such file, nor a folder with"),
    ],
)
def test_names_of_nothing(name, message):
    refused(name, message)


DOWNLOAD = """
import sys
from ssl_vit.common.errors import UserError
from ssl_vit.weights.official import open_weights
for name in ("timm:vit_tiny_patch16_224", "timm:vit_small_patch16_224"):
    try:
        opened = open_weights(name)
        print(opened.report, opened.path, opened.encoder.vit.pos_embed.double().sum().item())
    except UserError as error:
        print("UserError", str(error).count(chr(10)), error)
"""


def test_timm_pretrained(tmp_path):
    """From timm's own cache, filled here as it fills it; what is not there is told in one line."""
    model = noisy(timm.create_model("vit_tiny_patch16_224"))
    folder = tmp_path / "hub" / f"models--{model.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    path = folder / "snapshots" / "abc" / "model.safetensors"
    save_file(model.state_dict(), path)
    home = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", DOWNLOAD]
    environment = {**os.environ, **home}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    there, missing = done.stdout.splitlines()
    total = model.pos_embed.double().sum().item()
    assert there == f"150 of 150 tensors; left out: head 2 {path} {total}"
    expected = "UserError 0 timm:vit_small_patch16_224: its weights cannot be loaded: "
    assert missing.startswith(expected)


def test_ours(tmp_path):
    """A run folder and a file, not square; no weights are needed for the architecture."""
    config = EncoderConfig("vit_tiny_patch16_224", image_size=(16, 24), patch_size=8, depth=2,
                           positions="sincos", norm="pooled", norm_eps=1e-3)  # fmt: skip
    encoder = Encoder(config, 2)
    info = EncoderInfo(config, 2, (0.1, 0.2), (0.3, 0.4), "mae", 7)
    save_encoder(tmp_path / "encoder.safetensors", noisy(encoder), info)
    for name in (tmp_path, tmp_path / "encoder.safetensors"):
        opened = open_weights(name)
        agree(opened, encoder.vit.forward_features(images((16, 24), 2)), (16, 24))
        assert (opened.info, opened.format, opened.report) == (info, "ssl_vit", counted(opened))
        assert not opened.encoder.vit.pos_embed.requires_grad
        assert weights_info(name) == (info, tmp_path / "encoder.safetensors")
