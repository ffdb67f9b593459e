"""Models of Hugging Face against their own forward pass, and those that do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_vit.weights.official import open_weights, weights_info
from tests.unit.foreign_weights import (
    HALF,
    IMAGENET,
    agree,
    counted,
    images,
    noisy,
    refused,
    saved,
)

HIDDEN = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HIDDEN |= {"image_size": 32, "patch_size": 8}

KINDS = {
    "ViTMAEForPreTraining": ("ViTMAE", {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 48}),
    "ViTMAEModel": ("ViTMAE", {}),
    "ViTModel": ("ViT", {}),
    "ViTForImageClassification": ("ViT", {}),
    "ViTForMaskedImageModeling": ("ViT", {"encoder_stride": 8}),
    "Dinov2Model": ("Dinov2", {}),
    "Dinov2ForImageClassification": ("Dinov2", {"use_swiglu_ffn": True}),
    "Dinov2WithRegistersModel": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegisters", {"use_swiglu_ffn": True}),
}  # fmt: skip
LEFT_OUT = {
    "ViTMAEForPreTraining": "; left out: decoder 24",
    "ViTModel": "; left out: pooler 2",
    "ViTForImageClassification": "; left out: classifier 2",
    "ViTForMaskedImageModeling": "; left out: decoder 2, mask_token 1",
    "Dinov2Model": "; left out: mask_token 1",
    "Dinov2WithRegistersForImageClassification": "; left out: classifier 2, mask_token 1",
}


def hugging_face(name, **changes):
    """A small model of transformers by class name, and the tokens it makes of ``images``."""
    transformers = pytest.importorskip("transformers")
    kind, options = KINDS[name]
    mlp = {"mlp_ratio": 4} if "Dinov2" in kind else {"intermediate_size": 192}
    config = getattr(transformers, f"{kind}Config")(**{**HIDDEN, **mlp, **options, **changes})
    model = noisy(getattr(transformers, name)(config))
    extra = {}
    if kind == "ViTMAE":  # all patches, in their own order
        config.mask_ratio = 0.0
        extra = {"noise": torch.arange(16.0).expand(2, -1)}
    with torch.inference_mode():
        x = images(config.image_size) if isinstance(config.image_size, tuple) else images()
        tokens = model.base_model(x, **extra).last_hidden_state
    return model, tokens


@pytest.mark.parametrize("names", ["on disk", "in memory"])
@pytest.mark.parametrize("name", KINDS)
def test_hugging_face(tmp_path, name, names):
    """Folders written by ``save_pretrained``, and files with the names modules have in memory."""
    model, tokens = hugging_face(name)
    model.save_pretrained(tmp_path)
    if names == "in memory":
        (tmp_path / "model.safetensors").unlink()
        saved(model.state_dict(), tmp_path, "pytorch_model.bin")
    opened = open_weights(str(tmp_path))
    agree(opened, tokens, prefix=1 + getattr(model.config, "num_register_tokens", 0))
    assert opened.format == f"Hugging Face {KINDS[name][0]}"
    assert counted(opened) + LEFT_OUT.get(name, "") in opened.report
    assert opened.info.config.heads == 4
    eps = {m.eps for m in opened.encoder.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {model.config.layer_norm_eps}
    usual = HALF if KINDS[name][0] == "ViT" else IMAGENET
    assert (opened.info.mean, opened.info.std) == usual
    assert "are assumed" in opened.report
    assert weights_info(tmp_path) == (opened.info, opened.path)


def test_hugging_face_preprocessing_and_epsilon(tmp_path):
    """The folder's own statistics and epsilon; one large enough to be seen in the features."""
    model, tokens = hugging_face("ViTModel", layer_norm_eps=0.1)
    model.save_pretrained(tmp_path)
    text = json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]})
    (tmp_path / "preprocessor_config.json").write_text(text)
    opened = open_weights(tmp_path)
    agree(opened, tokens)
    assert (opened.info.mean, opened.info.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert "assumed" not in opened.report
    assert open_weights(tmp_path / "model.safetensors").info == opened.info


def test_hugging_face_not_square(tmp_path):
    """The grid is told by config.json."""
    model, tokens = hugging_face("ViTModel", image_size=(16, 32))
    model.save_pretrained(tmp_path)
    opened = open_weights(tmp_path)
    agree(opened, tokens, (16, 32))
    assert opened.encoder.image_size == (16, 32)


def test_hugging_face_file_alone(tmp_path):
    """Without config.json: epsilon as their ViTs have it, heads one for every 64 features."""
    model, tokens = hugging_face("ViTModel", hidden_size=128, num_attention_heads=2,
                                 intermediate_size=512)  # fmt: skip
    model.save_pretrained(tmp_path)
    opened = open_weights((tmp_path / "model.safetensors").rename(tmp_path / "vit.safetensors"))
    agree(opened, tokens)
    assert opened.info.config.norm_eps == 1e-12
    assert opened.info.config.heads == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "swin"}, r"of type 'swin'; known here: vit, vit_mae, dinov2"),
        ({"hidden_act": "relu"}, r"config.json: hidden_act is 'relu'; it must be gelu"),
        ({"num_attention_heads": "4"}, r"config.json: heads 4, epsilon 1e-12, image size .32, 32"),
        ({"num_attention_heads": 5}, r"--encoder.heads is 5; it must divide the width, 48"),
        ({"image_size": 64}, r"pos_embed is \(1, 17, 48\) for \(1, 65, 48\)"),
    ],
)
def test_hugging_face_configurations_that_do_not_fit(tmp_path, changes, message):
    hugging_face("ViTModel")[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.layer.1.attention.attention.key.weight"),
         r"missing encoder.layer.1.attention.attention.key.weight"),
        (lambda s: s.pop("encoder.layer.1.attention.attention.query.weight"),
         r"missing \(blocks.1.attn.qkv.weight\).*attention.attention.key.weight"),
        (lambda s: s.pop("embeddings.position_embeddings"),
         r"missing embeddings.position_embeddings"),
        (lambda s: s.update({"encoder.layer.1.attention.attention.key.bias": torch.zeros(3)}),
         r"attention.key.bias.* have shapes \[\(48,\), \(3,\), \(48,\)\]"),
        (lambda s: s.update({"encoder.layer.1.other.weight": torch.zeros(3)}),
         r"1 unexpected \(blocks.1.other.weight\)"),
        (lambda s: s.update({"layers.1.mlp.fc1.weight": torch.zeros(3)}),
         r"layers.1.mlp.fc1.weight exists under two names"),
    ],
)  # fmt: skip
def test_a_tensor_of_hugging_face_that_does_not_fit_is_named(tmp_path, change, message):
    """From safetensors of the long-standing names."""
    hugging_face("ViTModel")[0].save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    refused(tmp_path, message)
