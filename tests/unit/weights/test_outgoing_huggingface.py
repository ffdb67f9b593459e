"""Folders for transformers: opened by it, and by us, they give our features."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from ssl_vit.common.errors import UserError
from ssl_vit.data.augment import center_view
from ssl_vit.data.normalize import Normalize
from ssl_vit.weights.official import open_weights
from ssl_vit.weights.outgoing import FORMATS, export_encoder
from tests.unit.weights.test_outgoing import (
    BIASED,
    CLOSE,
    GATED,
    GIANT,
    ROTARY,
    export,
    features,
    make,
)


@torch.no_grad()
def same(encoder, model, prefix=1):
    """transformers' model against ours."""
    images, cls, patches = features(encoder)
    tokens = model.eval()(images).last_hidden_state
    torch.testing.assert_close(tokens[:, 0], cls, **CLOSE)
    torch.testing.assert_close(tokens[:, prefix:], patches, **CLOSE)


HUGGING = {
    "ViTModel": [
        {},
        {"image_size": (16, 32)},
        {"image_size": (32, 16), "layer_scale": 0.1},  # for which Dinov2Model is too square
        {"channels": 1},
        {"channels": 5},
        {"norm_eps": 1e-2},
        {"positions": "sincos"},
    ],
    "Dinov2Model": [{"layer_scale": 0.1}, {"arch": "vit_giant_patch14_dinov2", "channels": 1}],
    "Dinov2WithRegistersModel": [
        {"registers": 3},
        {"registers": 2, "layer_scale": 0.1, "norm_eps": 1e-2},
        {"arch": "vit_small_patch14_reg4_dinov2", "channels": 5},  # without a position for [CLS]
        {"arch": GIANT},
    ],
    "DINOv3ViTModel": ROTARY,
}


@pytest.mark.parametrize(("name", "changes"), [(n, c) for n, cs in HUGGING.items() for c in cs])
def test_transformers_opens_its_folder(tmp_path, name, changes):
    made = make(**changes)
    out = export(made, "huggingface", tmp_path)
    model, loading = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert type(model).__name__ == name
    same(made[0], model, made[0].vit.num_prefix_tokens)
    images, cls, _ = features(made[0])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).pooler_output, cls, **CLOSE)
    assert json.loads((out / "config.json").read_text())["ssl_vit"]["step"] == 7


def test_transformers_writes_it_again(tmp_path):
    """Names and configuration are ones that transformers itself reads and writes."""
    made = make(registers=3)
    model = AutoModel.from_pretrained(export(made, "huggingface", tmp_path))
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    same(made[0], again, 4)
    ours = load_file(tmp_path / "huggingface" / "model.safetensors")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == ours.keys()


@pytest.mark.parametrize("changes", [cs[-1] for cs in HUGGING.values()])
def test_we_open_it_again(tmp_path, changes):
    """A round trip through other names gives the same features and statistics."""
    made = make(**changes)
    opened = open_weights(export(made, "huggingface", tmp_path))
    images, cls, patches = features(made[0])
    with torch.no_grad():
        found = opened.encoder(images)
    torch.testing.assert_close(found.cls, cls, **CLOSE)
    torch.testing.assert_close(found.patches, patches, **CLOSE)
    assert (opened.info.mean, opened.info.std) == (made[1].mean, made[1].std)


@pytest.mark.parametrize(("size", "ratio"), [((56,), 1.0), ((56,), 0.875), ((16, 32), 0.875)])
def test_the_processor_prepares_images_as_we_do(tmp_path, size, ratio):
    """Exactly, but for the rounding of resized bytes; unsquare images are scaled as a whole."""
    encoder, info = make(image_size=size)
    out = tmp_path / "huggingface"
    export_encoder(encoder, info, "huggingface", out, ratio)
    processor = AutoImageProcessor.from_pretrained(out)
    height, width = encoder.image_size
    square = height == width
    image = torch.randint(
        256, (3, 100, 150 if square else 200), generator=torch.Generator().manual_seed(2)
    ).byte()
    smooth = nn.functional.avg_pool2d(image[None].float(), 5, 1, 2)[0].byte()
    theirs = processor(smooth, return_tensors="pt")["pixel_values"]
    seen = center_view(smooth, (height, width), ratio if square else 1.0)
    ours = Normalize(info.mean, info.std).images(seen[None])
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 2 / 255 / min(info.std)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"norm": "pooled"}, "has its final norm after the pooling"),
        ({"arch": "vit_base_patch16_siglip_224"}, "has no [CLS] token"),
        ({"arch": "vit_base_patch16_clip_224"}, "has a norm before its blocks"),
        ({"registers": 2, "image_size": (16, 32)}, "has register tokens and sizes that Dinov2"),
        (
            {"arch": GIANT, "width": 32, "heads": 2, "registers": 0},
            "has a SwiGLU MLP and sizes that Dinov2",
        ),
    ],
)
def test_what_transformers_has_no_model_for_is_refused(tmp_path, changes, fragment):
    with pytest.raises(UserError, match=r"^--to huggingface: ") as refusal:
        export(make(**changes), "huggingface", tmp_path)
    assert fragment in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"norm": "pooled"}, "has its final norm after the pooling"),
        ({"rope_periods": (1.0, 30.0)}, "has rotary periods of (1.0, 30.0)"),
        ({"rope_coords": "max"}, "has rotary coordinates by the max"),
    ],
)
def test_rotary_positions_that_transformers_has_not_are_refused(tmp_path, changes, fragment):
    with pytest.raises(UserError, match=r"^--to huggingface: .* no DINOv3") as refusal:
        export(make(arch=GATED, **changes), "huggingface", tmp_path)
    assert fragment in str(refusal.value)
    assert str(refusal.value).endswith("; --to onnx keeps it")


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"arch": BIASED, "image_size": (16, 32), "channels": 4},
        {"arch": GATED, "channels": 4},
        {"arch": "vit_7b_patch16_dinov3", "registers": 0},
    ],
)
def test_rotary_exports_agree_at_other_sizes(tmp_path, changes):
    """Than the one they are compared at: there is no table of positions to resample."""
    encoder, info = make(**changes)
    theirs = AutoModel.from_pretrained(export((encoder, info), "huggingface", tmp_path)).eval()
    space = {}
    exec(FORMATS["timm"].usage(export((encoder, info), "timm", tmp_path), info), space)
    for size in ((40, 24), (8, 64), (72, 72)):
        images = torch.randn(2, encoder.channels, *size)
        found = encoder(images)
        ours = torch.cat([found.cls[:, None], found.patches], dim=1)
        for tokens in (theirs(images).last_hidden_state, space["model"].forward_features(images)):
            kept = [0, *range(encoder.vit.num_prefix_tokens, tokens.shape[1])]
            torch.testing.assert_close(tokens[:, kept], ours, **CLOSE)


def test_a_rotary_folder_opens_as_it_was(tmp_path):
    """Names, sizes, epsilon, base of the periods; augmentation of coordinates is for training."""
    encoder, info = make(arch=BIASED, norm_eps=1e-2, rope_periods=(20.0,), rope_rescale=2.0)
    out = export((encoder, info), "huggingface", tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert (config["pos_embed_rescale"], config["pos_embed_shift"]) == (2.0, None)
    opened = open_weights(out)
    for name, tensor in encoder.vit.state_dict().items():
        assert torch.equal(opened.encoder.vit.state_dict()[name], tensor), name
    found, heads = opened.info.config, opened.encoder.vit.blocks[0].attn.num_heads
    assert (found.norm_eps, found.rope_periods, heads) == (1e-2, (20.0,), 3)


def test_a_tensor_without_a_place_is_refused(tmp_path):
    encoder, info = make()
    encoder.vit.blocks[1].attn.q_norm = nn.LayerNorm(16)
    with pytest.raises(UserError, match=r"no place for blocks\.1\.attn\.q_norm\.bias"):
        export((encoder, info), "huggingface", tmp_path)
    assert not list(tmp_path.iterdir())
