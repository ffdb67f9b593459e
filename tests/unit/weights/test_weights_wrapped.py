"""Encoders inside of what trainers save: teachers, moving averages, modules of Lightning, parts."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ssl_vit.weights.official import open_weights, weights_info
from tests.unit.foreign_weights import SQUARE, agree, counted, images, noisy, refused, saved, vit

ASSUMED = "; mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225) are assumed"


def named(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.fixture
def model():
    return vit(num_classes=0)


@pytest.fixture
def other():
    """A network of the same shapes that is not to be taken."""
    return noisy(vit(num_classes=0), seed=7).state_dict()


def dinov2(model):
    """As a DINOv2 of the same weights names them: with a scale, and a mask token."""
    scaled = vit("vit_small_patch14_dinov2", embed_dim=192, num_heads=3, num_classes=0)
    mask = {"mask_token": torch.zeros(1, 192)}
    return scaled, scaled.state_dict() | mask


@pytest.mark.parametrize("wrapped", ["", "_fsdp_wrapped_module."])
def test_rank_file_of_dinov2(tmp_path, model, other, wrapped):
    """``model_final.rank_0.pth`` of one process: student and teacher, each with its heads."""
    scaled, own = dinov2(model)
    content = named(f"teacher.backbone.{wrapped}", own) | named("student.backbone.", other)
    content |= {"teacher.dino_head.mlp.0.weight": torch.ones(2), "dino_loss.center": torch.ones(1)}
    optimizer = {"state": {0: {"step": 3}}, "param_groups": []}
    file = {"model": content, "optimizer": optimizer, "iteration": 9}
    opened = open_weights(saved(file, tmp_path, "model_final.rank_0.pth"))
    agree(opened, scaled.forward_features(images()))
    assert opened.format == "DINOv2 (official)"
    left = "; left out: dino_loss 1, mask_token 1, student 30, teacher.dino_head 1"
    taken = "; teacher.backbone is taken, not student.backbone"
    assert opened.report == counted(opened) + left + taken


def test_teacher_checkpoint_of_dinov2(tmp_path, model):
    """``teacher_checkpoint.pth``: nothing to choose; its heads beside it."""
    scaled, own = dinov2(model)
    teacher = named("backbone.", own) | {"ibot_head.last_layer.weight": torch.ones(2)}
    opened = open_weights(saved({"teacher": teacher}, tmp_path))
    agree(opened, scaled.forward_features(images()))
    assert opened.report == counted(opened) + "; left out: ibot_head 1, mask_token 1"


def test_flat_parameters_are_refused_with_the_file_to_take(tmp_path):
    flat = {"student.backbone._fsdp_wrapped_module._flat_param": torch.ones(5)}
    refused(saved({"model": flat}, tmp_path), r"flat \(student.*flat_param\).*teacher_checkpoint")


LIGHTNING = {
    # lightly's examples of DINO and DINOv2, of BYOL and MoCo, of MAE; solo-learn's.
    "dino": ("teacher_backbone.vit.", "student_backbone.vit."),
    "moco": ("backbone_momentum.vit.", "backbone.vit."),
    "mae": ("backbone.vit.", ""),
    "solo": ("momentum_backbone.", "backbone."),
    "nested": ("model.ema.vit.", "model.vit."),
    "gram": ("teacher.backbone.", "gram_teacher.backbone."),
}


@pytest.mark.parametrize(("taken", "left"), LIGHTNING.values(), ids=LIGHTNING)
def test_checkpoints_of_lightning(tmp_path, model, other, taken, left):
    """The average of two networks, whatever their order; all else is left out, and said to be."""
    state = named(left, other) if left else {}
    state |= named(taken, model.state_dict()) | {"projection_head.layers.0.weight": torch.ones(2)}
    content = {"epoch": 1, "pytorch-lightning_version": "2.0", "state_dict": state, "loops": {}}
    opened = open_weights(saved(content, tmp_path, "last.ckpt"))
    agree(opened, model.forward_features(images()))
    assert opened.format == "timm"
    parts = {"projection_head": 1}
    if left:
        words, own = left.rstrip(".").split("."), taken.rstrip(".").split(".")
        same = [a == b for a, b in zip(words, own, strict=False)]
        parts[".".join(words[: same.index(False) + 1])] = 30
    listed = ", ".join(f"{name} {count}" for name, count in sorted(parts.items()))
    chosen = f"; {taken[:-1]} is taken, not {left[:-1]}" if left else ""
    said = f"{counted(opened)}; left out: {listed}{chosen}{SQUARE}{ASSUMED}"
    assert opened.report == said
    assert weights_info(tmp_path / "last.ckpt")[0] == opened.info


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
def test_the_moving_average_as_timm_does(tmp_path, model, other, average):
    plain = "state_dict" if average == "state_dict_ema" else "model"
    content = {"epoch": 3, plain: other, average: model.state_dict(), "optimizer": {}}
    opened = open_weights(saved(content, tmp_path))
    agree(opened, model.forward_features(images()))
    assert f"; {average} is taken, not {plain}" in opened.report
    content[average] = None  # as trainings without one write it
    opened = open_weights(saved(content, tmp_path))
    assert torch.equal(opened.encoder.vit.cls_token, other["cls_token"])
    assert "is taken" not in opened.report


def test_a_timm_trainings_own_architecture(tmp_path):
    """``arch`` of timm's training script tells what plain shapes do not."""
    clip = vit("vit_base_patch16_clip_224", embed_dim=192, num_heads=3, num_classes=0)
    content = {"arch": "vit_base_patch16_clip_224", "state_dict": clip.state_dict(), "metric": 0.5}
    agree(open_weights(saved(content, tmp_path)), clip.forward_features(images()))
    # A name that is none of timm's plain ViTs is not used.
    named = {"arch": "vit_tiny", "state_dict": vit(num_classes=0).state_dict()}
    assert open_weights(saved(named, tmp_path)).info.config.arch == "vit_tiny_patch16_224"


def test_a_network_under_any_key(tmp_path, model):
    content = {"epoch": 3, "net": named("module.encoder.", model.state_dict())}
    opened = open_weights(saved(content, tmp_path))
    agree(opened, model.forward_features(images()))


# -- files in several parts


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def parts(request, tmp_path, model):
    """A Hugging Face folder of timm's weights in three parts, with its index."""
    state, stem = model.state_dict(), request.param.rpartition(".")
    places = {}
    for i, names in enumerate((list(state)[::3], list(state)[1::3], list(state)[2::3])):
        file = f"{stem[0]}-{i + 1:05d}-of-00003.{stem[2]}"
        tensors = {name: state[name] for name in names}
        if stem[2] == "bin":
            torch.save(tensors, tmp_path / file)
        else:
            save_file(tensors, tmp_path / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (tmp_path / f"{request.param}.index.json").write_text(json.dumps(index))
    return tmp_path, request.param


def test_a_folder_in_parts(parts, model):
    folder, name = parts
    for given in (folder, folder / f"{name}.index.json"):
        opened = open_weights(given)
        agree(opened, model.forward_features(images()))
        assert opened.path == folder / f"{name}.index.json"
        assert weights_info(given)[0] == opened.info
    suffix = name.rpartition(".")[2]
    one = next(folder.glob(f"*-00002-of-00003.{suffix}"))
    refused(one, rf"part 2 of 3; give .*{name}\.index\.json$")


def test_a_missing_part_is_named(parts):
    folder, _ = parts
    lost = next(folder.glob("*-00002-of-00003.*"))
    content = lost.read_bytes()
    lost.unlink()
    refused(folder, rf"1 of its 3 files are missing: {lost.name}")
    lost.write_bytes(content[: len(content) // 2])
    refused(folder, rf"{lost.name}: (damaged|not a safetensors file)")
    save_file({"a": torch.ones(1)}, lost) if "safe" in lost.name else torch.save({}, lost)
    refused(folder, rf"{lost.name}: tensors are missing: ")


@pytest.mark.parametrize("places", [None, {}, [], {"cls_token": "../secret"}, {"cls_token": 3}])
def test_an_index_that_is_none(tmp_path, places):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(tmp_path, "no weight_map from tensors to files beside it")


def test_hugging_face_writes_such_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3,
                                    intermediate_size=768, image_size=32, patch_size=8)  # fmt: skip
    theirs = noisy(transformers.ViTModel(config))
    theirs.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.inference_mode():
        agree(open_weights(tmp_path), theirs(images()).last_hidden_state)


# -- what is no plain ViT


def timms(name, **kwargs):
    return list(timm.create_model(name, **kwargs).state_dict())


LOOKS = {
    "a ConvNeXt": lambda: timms("convnext_atto"),
    "a ResNet": lambda: timms("resnet10t"),
    "a Swin Transformer": lambda: timms("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    "a BEiT": lambda: timms("beit_base_patch16_224", depth=1),
    "an EVA": lambda: timms("eva02_tiny_patch14_224", depth=1),
    "a convolutional network": lambda: timms("efficientnet_lite0"),
    "a CLIP": lambda: ["visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight"],
    "a SAM": lambda: ["image_encoder.patch_embed.proj.weight", "image_encoder.pos_embed",
                      "image_encoder.blocks.0.attn.rel_pos_h"],
    "a LoRA adapter": lambda: ["base_model.model.blocks.0.attn.qkv.lora_A.weight"],
    "a ViT with torchvision's": lambda: ["conv_proj.weight",
                                         "encoder.layers.encoder_layer_0.mlp.0.weight"],
    "a language model": lambda: ["model.embed_tokens.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", LOOKS)
def test_what_a_file_looks_like_is_said(tmp_path, kind):
    content = {name: torch.zeros(1) for name in LOOKS[kind]()}
    refused(saved(content, tmp_path), f"not a known Vision Transformer; it looks like {kind}")


def test_adapters_inside_a_network_are_not_taken_for_one(tmp_path, model):
    """Left as they are they would be left out, and the network would be another."""
    state = model.state_dict() | {"blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(2)}
    refused(saved(state, tmp_path), "it looks like a LoRA adapter.*: merge it into its network")


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_optimizer_alone(tmp_path, wrapped):
    optimizer = torch.optim.AdamW(vit().parameters()).state_dict()
    content = {"optimizer": optimizer, "epoch": 3} if wrapped else optimizer
    message = "with keys optimizer, epoch" if wrapped else "but the state of an optimizer alone"
    refused(saved(content, tmp_path), f"no weights: not a dictionary of named tensors,? {message}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ours", [True, False])
def test_values_that_are_no_numbers_are_named(tmp_path, model, value, ours):
    path = saved(model.state_dict(), tmp_path)
    if ours:
        from ssl_vit.weights.exchange import save_encoder

        opened = open_weights(path)
        opened.encoder.vit.norm.bias.data[3] = value
        path = tmp_path / "encoder.safetensors"
        save_encoder(path, opened.encoder, opened.info)
        assert not load_file(path)["norm.bias"].isfinite().all()
    else:
        model.norm.bias.data[3] = value
        saved(model.state_dict(), tmp_path)
    refused(path, r"1 of 30 tensors have values .* no numbers \(NaN\): norm\.bias")
