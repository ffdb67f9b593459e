"""Hugging Face export: encoders as folders that transformers opens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_vit.common.errors import RunFailed, check
from ssl_vit.model.block import LeanBlock, LeanMlp
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.dinov3_out import check_dinov3, dinov3_config, dinov3_state
from ssl_vit.weights.exchange import EncoderInfo, contiguous_state

# Files of an export; a folder with other files is not overwritten.
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
_CLASSES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
# Parts of a block: timm's names, and those in transformers' files. Version 5 has other names in
# memory but reads these as well; version 4 reads only these.
_SHARED = {"attn.proj": "attention.output.dense"}
_VIT = _SHARED | {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2 = _SHARED | {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_SWIGLU = _DINOV2 | {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}


def is_swiglu(encoder: Encoder) -> bool:
    """True if the MLPs are DINOv2's SwiGLU: the SiLU of one half times the other."""
    mlp = encoder.vit.blocks[0].mlp
    return type(mlp).__name__ == "GluMlp" and isinstance(mlp.act, nn.SiLU) and not mlp.gate_last


def has_layer_scale(encoder: Encoder) -> bool:
    """True if the blocks have layer scale."""
    return not isinstance(encoder.vit.blocks[0].ls1, nn.Identity)


def fits_dinov2(encoder: Encoder) -> bool:
    """True if transformers' Dinov2 models support its sizes.

    They resample positions as if images were square, and their MLPs are an integer multiple of the
    width (SwiGLU's: two thirds of four times it, up to a multiple of 8,
    each half).
    """
    width, hidden = encoder.width, encoder.vit.blocks[0].mlp.fc1.out_features
    if is_swiglu(encoder):
        fits = hidden == 2 * ((width * 4 * 2 // 3 + 7) // 8 * 8)
    else:
        fits = hidden % width == 0
    return fits and encoder.image_size[0] == encoder.image_size[1]


def family(encoder: Encoder) -> str:
    """Equivalent transformers model: vit, dinov2, dinov2_with_registers or dinov3_vit.

    With layer scale a Dinov2Model or, where that does not support the sizes, a ViTModel with the
    scale multiplied into the weights; with registers but no layer scale, a scale of 1.

    Raises:
        UserError: there is none; the reason is given.
    """
    if encoder.rotary:
        check_dinov3(encoder)
        return "dinov3_vit"
    vit, block = encoder.vit, encoder.vit.blocks[0]
    registers, swiglu = vit.num_reg_tokens > 0, is_swiglu(encoder)
    activation = type(block.mlp.act).__name__
    mlp = "Mlp" if isinstance(block.mlp, LeanMlp) else type(block.mlp).__name__
    known = swiglu or (mlp == "Mlp" and activation in _ACTIVATIONS)
    fits = fits_dinov2(encoder)
    extra = "register tokens" if registers else "a SwiGLU MLP"
    obstacles = {
        "has no [CLS] token": vit.cls_token is None,
        "has its final norm after the pooling": isinstance(vit.norm, nn.Identity),
        "has a norm before its blocks": not isinstance(vit.norm_pre, nn.Identity),
        f"is made of timm's {type(block).__name__}": type(block) is not LeanBlock,
        f"has {type(block.norm1).__name__}": not isinstance(block.norm1, nn.LayerNorm),
        f"has the MLP {mlp} with {activation}": not known,
        f"has {extra} and sizes that Dinov2Model lacks": (registers or swiglu) and not fits,
    }
    check(
        encoder.config.stem == "patch",
        "--to huggingface: transformers has no ViT with a convolutional stem; --to onnx keeps it",
    )
    for what, holds in obstacles.items():
        check(
            not holds,
            f"--to huggingface: transformers has no ViT like this one, which {what}; --to timm and "
            "--to onnx keep it",
        )
    if registers:
        return "dinov2_with_registers"
    return "dinov2" if fits and (swiglu or has_layer_scale(encoder)) else "vit"


def rename_block(part: dict[str, Tensor], kind: str, swiglu: bool) -> dict[str, Tensor]:
    """Rename one block's tensors to transformers' names, removing those renamed from ``part``."""
    names = _VIT if kind == "vit" else _SWIGLU if swiglu else _DINOV2
    for scale, linear in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        if kind != "vit":
            part.setdefault(scale, torch.ones_like(part["norm1.weight"]))
        elif scale in part:
            gamma = part.pop(scale)
            for key in (f"{linear}.weight", f"{linear}.bias"):
                part[key] = torch.einsum("d,d...->d...", gamma, part[key])
    made = {}
    for leaf in ("weight", "bias"):
        thirds = part.pop(f"attn.qkv.{leaf}").chunk(3) if f"attn.qkv.{leaf}" in part else ()
        for name, third in zip(("query", "key", "value"), thirds, strict=False):
            made[f"attention.attention.{name}.{leaf}"] = third
    for ours, theirs in names.items():
        for leaf in ("", ".weight", ".bias"):
            if ours + leaf in part:
                made[theirs + leaf] = part.pop(ours + leaf)
    return made


def huggingface_state(encoder: Encoder, kind: str) -> dict[str, Tensor]:
    """Weights of an encoder with the names and shapes of transformers' model ``kind``.

    Raises:
        UserError: that model lacks some of the tensors.
    """
    rest = {k: v.float() for k, v in contiguous_state(encoder.vit).items()}
    if kind == "dinov3_vit":
        return {k: v.clone().contiguous() for k, v in dinov3_state(encoder, rest).items()}
    own, patches = encoder.positions(encoder.grid)
    assert patches is not None
    tokens = torch.cat(
        [t for t in (encoder.vit.cls_token, encoder.vit.reg_token) if t is not None], 1
    )
    # transformers has a position for [CLS]; those of registers are added to the registers.
    tokens = (tokens if own is None else tokens + own).detach().cpu().float()
    zero = torch.zeros(1, 1, encoder.width)
    made = {
        "embeddings.cls_token": tokens[:, :1],
        "embeddings.position_embeddings": torch.cat([zero, patches.detach().cpu().float()], 1),
    }
    for name in ("cls_token", "reg_token", "pos_embed"):
        rest.pop(name, None)
    for leaf in ("weight", "bias"):
        made[f"embeddings.patch_embeddings.projection.{leaf}"] = rest.pop(
            f"patch_embed.proj.{leaf}"
        )
        made[f"layernorm.{leaf}"] = rest.pop(f"norm.{leaf}")
    if kind == "vit":
        # AutoModel's ViTModel has a pooler. An identity makes its output the [CLS] feature.
        made["pooler.dense.weight"] = torch.eye(encoder.width)
        made["pooler.dense.bias"] = torch.zeros(encoder.width)
    else:
        made["embeddings.mask_token"] = zero[0]
    if kind == "dinov2_with_registers":
        made["embeddings.register_tokens"] = tokens[:, 1:]
    for i in range(len(encoder.vit.blocks)):
        start = f"blocks.{i}."
        part = {k.removeprefix(start): rest.pop(k) for k in list(rest) if k.startswith(start)}
        block = rename_block(part, kind, is_swiglu(encoder))
        made |= {f"encoder.layer.{i}.{k}": v for k, v in block.items()}
        rest |= {start + k: v for k, v in part.items()}
    left = sorted(k for k in rest if not k.startswith("attn_pool."))
    message = (
        f"--to huggingface: transformers' {_CLASSES[kind]} has no place for {', '.join(left[:3])}"
    )
    check(not left, message)
    return {k: v.clone().contiguous() for k, v in made.items()}


def huggingface_config(encoder: Encoder, info: EncoderInfo, kind: str) -> dict[str, Any]:
    """Configuration of transformers' model ``kind``."""
    vit, block = encoder.vit, encoder.vit.blocks[0]
    height, width = encoder.image_size
    config = {
        "hidden_size": encoder.width,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": vit.norm.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "num_channels": encoder.channels,
        "architectures": [_CLASSES[kind]],
        "ssl_vit": dataclasses.asdict(info),
    }
    if kind == "dinov3_vit":
        return config | dinov3_config(encoder)
    hidden = block.mlp.fc1.out_features
    # A SwiGLU MLP has its own activation; DINOv2's configurations have gelu all the same.
    config["hidden_act"] = _ACTIVATIONS.get(type(block.mlp.act).__name__, "gelu")
    config["qkv_bias"] = block.attn.qkv.bias is not None
    if kind == "vit":
        return config | {"intermediate_size": hidden, "pooler_act": "linear"}
    swiglu = is_swiglu(encoder)
    config |= {"use_swiglu_ffn": swiglu, "mlp_ratio": 4 if swiglu else hidden // encoder.width}
    if kind == "dinov2_with_registers":
        config["num_register_tokens"] = vit.num_reg_tokens
    return config


def write_huggingface(folder: Path, encoder: Encoder, info: EncoderInfo, crop_ratio: float) -> None:
    """Write a folder that ``transformers.AutoModel`` and ``AutoImageProcessor`` open.

    For square encoders the processor prepares images as our evaluations do: a centre crop of
    ``crop_ratio`` of the short side; for others images are resized as a whole.

    Raises:
        UserError: transformers has no equivalent model.
    """
    from transformers import AutoConfig, BitImageProcessor

    kind = family(encoder)
    state = huggingface_state(encoder, kind)
    folder.mkdir()
    AutoConfig.for_model(kind, **huggingface_config(encoder, info, kind)).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    height, width = encoder.image_size
    square = height == width
    whole = {"height": height, "width": width}
    BitImageProcessor(
        size={"shortest_edge": round(height / crop_ratio)} if square else whole,
        crop_size=whole,
        do_center_crop=square,
        do_convert_rgb=encoder.channels == 3,
        image_mean=list(info.mean),
        image_std=list(info.std),
    ).save_pretrained(folder)


def huggingface_features(folder: Path, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
    """Features that transformers computes from a folder: ``cls`` (b, d), ``patches`` (b, n, d).

    Raises:
        RunFailed: the file's tensors do not match the model's.
    """
    from transformers import AutoModel

    with quiet():
        model, loading = AutoModel.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, dtype=torch.float32
        )
    wrong = [f"{kind} {sorted(map(str, keys))[:3]}" for kind, keys in loading.items() if keys]
    if wrong:
        raise RunFailed(f"transformers reports mismatched tensors: {', '.join(wrong)}")
    tokens = model.eval()(images).last_hidden_state
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    return {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager: transformers without progress bar, logging errors only."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def is_huggingface_export(folder: Path) -> bool:
    """True if a folder contains such an export and nothing else."""
    if not folder.is_dir() or {p.name for p in folder.iterdir()} - set(FILES):
        return False
    try:
        return "ssl_vit" in json.loads((folder / FILES[0]).read_text())
    except (OSError, ValueError):
        return False
