"""Files of weights that do not fit, are damaged, or would execute something."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from ssl_vit.weights.from_timm import tensors_only
from ssl_vit.weights.official import open_weights
from tests.unit.foreign_weights import OPTIONS, agree, images, refused, saved, vit


def change(state, kind):
    key = "blocks.1.mlp.fc2.weight"
    if kind == "missing":
        del state[key]
    elif kind == "extra":
        state["blocks.1.mlp.fc3.weight"] = torch.zeros(2)
    else:
        state[key] = torch.zeros(192, 700)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"1 missing \(blocks.1.mlp.fc2.weight\)"),
        ("extra", r"1 unexpected \(blocks.1.mlp.fc3.weight\)"),
        ("shape", r"blocks.1.mlp.fc2.weight is \(192, 700\) for \(192, 768\)"),
    ],
)
@pytest.mark.parametrize("format_", ["mae", "dino", "timm"])
def test_a_tensor_that_does_not_fit_is_named(tmp_path, kind, message, format_):
    state = dict(vit(num_classes=0).state_dict())
    change(state, kind)
    if format_ == "mae":
        state = {"model": state | {"mask_token": torch.zeros(1, 1, 4)}}
    if format_ == "dino":
        state = {"teacher": {f"backbone.{k}": v for k, v in state.items()}}
    refused(saved(state, tmp_path), message)


class Bomb:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_executes(tmp_path, legacy):
    """A pickle that would call ``os.system``; torch's newer and older formats."""
    marker = tmp_path / "marker"
    path = tmp_path / "bomb.pth"
    content = {"model": vit().state_dict(), "args": Bomb(f"touch {marker}")}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(path, r"a pickle of \S*system; allowed: tensors and plain values")
    refused(f"timm:vit_tiny_patch16_224:{path}", "a pickle of")
    assert not marker.exists()


def test_nothing_executes_within_timm(tmp_path):
    """Where timm itself would load any object."""
    path = saved(Bomb(f"touch {tmp_path / 'marker'}"), tmp_path)
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert not (tmp_path / "marker").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_of_torch(tmp_path, legacy):
    model = vit(num_classes=0)
    content = {"model": model.state_dict(), "args": OPTIONS}
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    agree(open_weights(path), model.forward_features(images()))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_damaged_files(tmp_path, kind, share):
    state = vit(num_classes=0).state_dict()
    path = tmp_path / "model.safetensors"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path, "model.safetensors: (damaged|not a safetensors file)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no weights: not a dictionary of named tensors"),
        ({}, "no weights"),
        ({"epoch": 3, "loss": 0.5}, "no weights.*with keys epoch, loss"),
        ({"conv1.weight": torch.zeros(1), "bn1.bias": torch.zeros(1)},
         r"not a known Vision Transformer.*among 2 tensors \(conv1.weight, bn1.bias"),
        ({"patch_embed.proj.weight": torch.zeros(1), "pos_embed": torch.zeros(1)},
         r"patch_embed.proj.weight is \(1,\); expected \(width, channels, P, P\)"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8), "pos_embed": torch.zeros(1)},
         r"pos_embed is \(1,\); expected \(1, positions, 64\)"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8), "pos_embed": torch.zeros(1, 8, 64),
          "cls_token": torch.zeros(1, 1, 64), "blocks.0.norm1.weight": torch.zeros(64)},
         "7 positions for patches; not a square grid"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8), "pos_embed": torch.zeros(1, 5, 64),
          "cls_token": torch.zeros(1, 1, 64)}, "no blocks.0 among its tensors"),
    ],
)  # fmt: skip
def test_what_is_no_encoder(tmp_path, content, message):
    refused(saved(content, tmp_path), message)


def test_a_folder_without_weights(tmp_path):
    refused(tmp_path, "nor a folder with encoder.safetensors or model.safetensors or pytorch_model")
