"""Encoders with rotary positions as transformers' DINOv3ViTModel: its names and configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.renaming import renamed

_NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^blocks\.(\d+)\.", r"layer.\1."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.fc1_g\.", ".mlp.gate_proj."),
    (r"\.mlp\.fc1(_x)?\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
)


def is_gated(encoder: Encoder) -> bool:
    """True if the MLPs are gated by the SiLU of another layer."""
    return hasattr(encoder.vit.blocks[0].mlp, "fc1_g")


def check_dinov3(encoder: Encoder) -> None:
    """Check that transformers' DINOv3ViTModel computes the same.

    Raises:
        UserError: it does not; the reason is given.
    """
    config = encoder.config
    obstacles = {
        "has its final norm after the pooling": config.norm == "pooled",
        f"has rotary periods of {config.rope_periods}": len(config.rope_periods) != 1,
        f"has rotary coordinates by the {config.rope_coords}": config.rope_coords != "separate",
    }
    for what, holds in obstacles.items():
        check(
            not holds,
            f"--to huggingface: transformers has no DINOv3 like this one, which {what}; --to onnx "
            "keeps it",
        )


def dinov3_state(encoder: Encoder, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights ``state`` of an encoder under transformers' names."""
    state = dict(state)
    for name in [k for k in state if k.endswith(".attn.qkv.weight")]:
        parts = zip("qkv", state.pop(name).chunk(3), strict=True)
        start = name.removesuffix("attn.qkv.weight")
        state |= {f"{start}attention.{part}_proj.weight": third for part, third in parts}
    state.setdefault("reg_token", torch.zeros(1, 0, encoder.width))
    made = renamed(state, _NAMES, "--to huggingface")
    return made | {"embeddings.mask_token": torch.zeros(1, 1, encoder.width)}


def dinov3_config(encoder: Encoder) -> dict[str, Any]:
    """Values of transformers' configuration, beside those of all ViTs."""
    vit, block, gated = encoder.vit, encoder.vit.blocks[0], is_gated(encoder)
    biased, config = block.attn.q_bias is not None, encoder.config
    return {
        "intermediate_size": block.mlp.fc2.in_features,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": biased,
        "key_bias": False,
        "value_bias": biased,
        "num_register_tokens": vit.num_prefix_tokens - 1,
        "rope_theta": config.rope_periods[0],
        # In training only; 0 is none here, and None is there.
        "pos_embed_shift": config.rope_shift or None,
        "pos_embed_jitter": config.rope_jitter or None,
        "pos_embed_rescale": config.rope_rescale or None,
    }
