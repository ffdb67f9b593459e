"""Kind of a file that holds no plain Vision Transformer, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

_EVALUATED = ", which opens for evaluation as timm:NAME:FILE, where it is timm's"
_KINDS = (
    (r"(^|\.)lora_[AB]\.|\.lora_(down|up)\.",
     "a LoRA adapter, which holds changes to a network only: merge it into its network, save that"),
    (r"image_encoder\..*(rel_pos_h|patch_embed)|vision_encoder\..*rel_pos_h",
     "a SAM, whose encoder has windows and relative positions; an official file opens for "
     "evaluation"),
    (r"(^|\.)visual\.(conv1|transformer)\.|vision_model\.embeddings\.|^logit_scale$",
     "a CLIP of OpenAI's or Hugging Face's names; timm has the same as vit_*_clip_*"),
    (r"(^|\.)downsample_layers\.\d|stages\.\d+\.(\w+\.)?\d+\.(dwconv|conv_dw)\.",
     f"a ConvNeXt{_EVALUATED}"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.|swin\.encoder\.", f"a Swin Transformer{_EVALUATED}"),
    (r"relative_position_bias|rel_pos_bias", f"a BEiT, with relative positions{_EVALUATED}"),
    (r"layer[1-4]\.\d+\.conv\d\.|resnet\.encoder\.stages", f"a ResNet{_EVALUATED}"),
    (r"encoder_layer_\d+\.|(^|\.)conv_proj\.", "a ViT with torchvision's names"),
    (r"(^|\.)(storage_tokens|rope_embed\.periods)$|rope_embeddings",
     "a DINOv3, with rotary positions"),
    (r"blocks\.\d+\.attn\.(q_bias|v_bias|rope)|(^|\.)rope\.", "an EVA, with rotary positions"),
    (r"(^|\.)(conv_stem|features\.0\.0)\.", f"a convolutional network{_EVALUATED}"),
    (r"(^|\.)(embed_tokens|wte|word_embeddings)\.", "a language model"),
)  # fmt: skip


def looks_like(names: Iterable[str]) -> str:
    """Kind of network that tensors of these names belong to, with what can be done; or empty."""
    every = list(names)
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in every):
            return kind
    return ""
