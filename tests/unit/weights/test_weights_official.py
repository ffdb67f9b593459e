"""The official releases of MAE, DINO and DINOv2 against timm's forward pass."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo
from ssl_vit.weights.grids import Hints
from ssl_vit.weights.official import open_weights
from ssl_vit.weights.shapes import infer
from tests.unit.foreign_weights import (
    IMAGENET,
    OPTIONS,
    SQUARE,
    TINY,
    TINY_CONFIG,
    agree,
    counted,
    images,
    noisy,
    saved,
    vit,
)


def mae_state(model):
    """The names of the official MAE's pretraining checkpoint around a timm model's."""
    decoder = timm.create_model("vit_tiny_patch16_224", **TINY, num_classes=0)
    state = dict(model.state_dict()) | {"mask_token": torch.randn(1, 1, 192)}
    for key, value in decoder.state_dict().items():
        if key.startswith(("blocks", "norm", "pos_embed")):
            state[f"decoder_{key}"] = value
    for name, shape in {"decoder_embed": (192, 192), "decoder_pred": (192, 192)}.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(shape), torch.randn(192)
    return state


def test_official_mae(tmp_path):
    """With optimizer and options in it; the decoder is left out, and said to be."""
    model = vit(num_classes=0)
    with torch.no_grad():
        model.pos_embed[:, 0] = 0  # as fixed sine-cosine positions have it
    extra = {"optimizer": {"state": {0: {"step": 3}}}, "epoch": 3, "scaler": {}, "args": OPTIONS}
    opened = open_weights(saved({"model": mae_state(model), **extra}, tmp_path))
    agree(opened, model.forward_features(images()))
    assert opened.format == "MAE (official)"
    assert opened.report == f"{counted(opened)}; left out: decoder 31, mask_token 1{SQUARE}"
    config = replace(TINY_CONFIG, resampling="mae")
    assert opened.info == EncoderInfo(config, 3, *IMAGENET, method="mae")
    # The encoder alone, as the smaller of the released files.
    alone = open_weights(saved({"model": model.state_dict()}, tmp_path))
    agree(alone, model.forward_features(images()))
    assert (alone.format, alone.report) == ("MAE (official)", counted(alone) + SQUARE)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_official_mae_fine_tuned(tmp_path, pool):
    """Global-pooled, its norm sits after the pooling, and features carry it."""
    model = vit(num_classes=10, global_pool=pool)
    opened = open_weights(saved({"model": model.state_dict(), "args": OPTIONS}, tmp_path))
    tokens = model.forward_features(images())
    agree(opened, tokens)
    kind = {"avg": "mean", "token": "cls"}[pool]
    pooled = opened.encoder(images()).pool(kind)
    torch.testing.assert_close(
        pooled, model.forward_head(tokens, pre_logits=True), atol=1e-5, rtol=1e-5
    )
    assert opened.info.config.norm == ("pooled" if pool == "avg" else "tokens")
    assert opened.report.startswith(f"{counted(opened)}; left out: head 2")
    if pool == "avg":
        assert opened.format == "MAE (official)"


@pytest.mark.parametrize("wrapping", ["", "module."])
def test_official_dino(tmp_path, wrapping):
    """Of student and teacher the teacher's backbone; a backbone alone has timm's names."""
    model = vit(num_classes=0)
    head = {f"head.mlp.{i}.weight": torch.randn(4, 4) for i in (0, 2)}
    backbone = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    teacher = {f"{wrapping}{k}": v for k, v in (backbone | head).items()}
    student = {f"module.{k}": torch.zeros_like(v) for k, v in (backbone | head).items()}
    content = {"student": student, "teacher": teacher, "optimizer": {}, "epoch": 100}
    content |= {"args": OPTIONS, "dino_loss": {"center": torch.randn(1, 8)}}
    opened = open_weights(saved(content, tmp_path))
    agree(opened, model.forward_features(images()))
    assert opened.format == "DINO (official)"
    assert opened.report == f"{counted(opened)}; left out: head 2; teacher is taken, not student"
    config = replace(TINY_CONFIG, resampling="dino")
    assert opened.info == EncoderInfo(config, 3, *IMAGENET, method="dino")
    alone = open_weights(saved(model.state_dict(), tmp_path))
    agree(alone, model.forward_features(images()))


def dinov2_state(arch, chunked, **kwargs):
    """The names of the official DINOv2 around random weights, and timm's model with the same."""
    kwargs = {"img_size": 56, "patch_size": 14, "depth": 2, "num_classes": 0} | kwargs
    model = noisy(timm.create_model(arch, **kwargs))
    official = {}
    for key, value in model.state_dict().items():
        name = key.replace("reg_token", "register_tokens").replace("mlp.fc1", "mlp.w12")
        name = name.replace("mlp.fc2", "mlp.w3")
        name = name if "giant" in arch else key.replace("reg_token", "register_tokens")
        if chunked and name.startswith("blocks."):
            name = f"blocks.{name.split('.')[1]}.{name.removeprefix('blocks.')}"
        official[name] = value.clone()
    official["mask_token"] = torch.randn(1, model.embed_dim)
    if "register_tokens" in official:
        first = torch.randn(1, 1, model.embed_dim)
        official["pos_embed"] = torch.cat([first, official["pos_embed"]], dim=1)
    theirs = {k.replace("blocks.0.0", "blocks.0").replace("blocks.1.1", "blocks.1"): v.clone()
              for k, v in official.items()}  # fmt: skip
    model.load_state_dict(checkpoint_filter_fn(theirs, model), strict=True)
    return official, model


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("arch", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_official_dinov2(tmp_path, arch, chunked):
    official, model = dinov2_state(arch, chunked)
    opened = open_weights(saved(official, tmp_path))
    prefix = model.num_prefix_tokens
    agree(opened, model.forward_features(images((56, 56))), (56, 56), prefix)
    assert opened.format == "DINOv2 (official)"
    assert opened.report == f"{counted(opened)}; left out: mask_token 1"
    resampling = "timm" if "reg4" in arch else "dino"
    config = EncoderConfig(arch, image_size=(56,), depth=2, resampling=resampling)
    assert opened.info == EncoderInfo(config, 3, *IMAGENET, method="dinov2")


@pytest.mark.parametrize("registers", ["", "reg4_"])
def test_official_dinov2_giant(tmp_path, registers):
    """Its gated MLP has other names; heads of a width that is a standard one are that one's."""
    arch = f"vit_giant_patch14_{registers}dinov2"
    official, model = dinov2_state(arch, False, embed_dim=192, num_heads=3)
    opened = open_weights(saved(official, tmp_path))
    prefix = model.num_prefix_tokens
    agree(opened, model.forward_features(images((56, 56))), (56, 56), prefix)
    config = EncoderConfig(arch, image_size=(56,), width=192, depth=2, heads=3)
    assert replace(opened.info.config, resampling="mixed") == config


def test_teacher_of_a_dinov2_training(tmp_path):
    """Backbone in chunks beside two heads."""
    official, model = dinov2_state("vit_small_patch14_dinov2", True)
    teacher = {f"backbone.{k}": v for k, v in official.items()}
    teacher |= {"dino_head.mlp.0.weight": torch.randn(2, 2), "ibot_head.a": torch.randn(2)}
    opened = open_weights(saved({"teacher": teacher}, tmp_path))
    agree(opened, model.forward_features(images((56, 56))), (56, 56))
    assert opened.format == "DINOv2 (official)"
    assert opened.report.endswith("; left out: dino_head 1, ibot_head 1, mask_token 1")


STANDARD = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
    "vit_gigantic_patch14_224",
    *[f"vit_{s}_patch14_{r}dinov2" for s in ("small", "base", "large", "giant")
      for r in ("", "reg4_")],
]  # fmt: skip


@pytest.mark.parametrize("arch", STANDARD)
def test_standard_architectures_are_known_by_their_shapes(arch):
    """Whole, without memory: nothing of timm's architecture is changed."""
    with without_memory():
        state = timm.create_model(arch, num_classes=0).state_dict()
    found = infer(state, "a file", Hints())
    assert (found.config, found.channels) == (EncoderConfig(arch), 3)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("vit_small_patch8_224", {"arch": "vit_small_patch16_224", "patch_size": 8}),
        ("vit_base_patch16_384", {"arch": "vit_base_patch16_224", "image_size": (384,)}),
        ("vit_base_patch32_224", {"arch": "vit_base_patch16_224", "patch_size": 32}),
    ],
)
def test_other_sizes_are_changes_of_a_standard_architecture(arch, expected):
    with without_memory():
        state = timm.create_model(arch, num_classes=0).state_dict()
    assert infer(state, "a file", Hints()).config == EncoderConfig(**expected)


@pytest.mark.parametrize("fixed", [True, False])
def test_fixed_positions_stay_fixed_and_learned_ones_learned(tmp_path, fixed):
    """MAE's own are not trained when it goes on; those of a fine-tuned file were."""
    config = EncoderConfig("vit_tiny_patch16_224", depth=2, positions="sincos")
    state = Encoder(config).vit.state_dict()
    if not fixed:
        state["pos_embed"] = state["pos_embed"] + 0.01
    torch.save({"model": state}, tmp_path / "mae.pth")
    encoder = open_weights(tmp_path / "mae.pth").encoder
    assert encoder.config.positions == ("sincos" if fixed else "learned")
    assert encoder.vit.pos_embed.requires_grad != fixed
    assert torch.equal(encoder.vit.pos_embed, state["pos_embed"])
