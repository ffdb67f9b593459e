"""Convolutional stem: patch tokens by small convolutions, which overlap (Xiao et al. 2021,
arXiv 2106.14881)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import ConvNormAct, HybridEmbed, LayerNorm2d
from torch import Tensor, nn


class ConvEmbed(HybridEmbed):
    """timm's hybrid embedding with 3x3 convolutions of stride 2, as many as halve a patch to one
    pixel, before the projection; each has a layer norm and a GELU after it.

    Widths double up to the tokens' own. The paper has batch norms: layer norms are of each image
    alone, so that features do not depend on the rest of a batch, and a step is the same in any
    number of processes and parts.

    Args:
        img_size: height and width of the images in pixels.
        patch_size: side of a patch, a power of two.
        in_chans: channels of the images.
        embed_dim: features of a token.
    """

    def __init__(
        self, img_size: Any, patch_size: int, in_chans: int, embed_dim: int, **options: Any
    ) -> None:
        count = patch_size.bit_length() - 1
        widths = [in_chans, *(embed_dim >> i for i in reversed(range(count)))]
        layers = [
            ConvNormAct(
                before, after, 3, stride=2, norm_layer=LayerNorm2d, act_layer=nn.GELU, bias=True
            )
            for before, after in pairwise(widths)
        ]
        bias = options.get("bias", True)
        super().__init__(nn.Sequential(*layers), img_size, 1, None, None, in_chans, embed_dim, bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patch tokens without positions."""
        # Convolutions and the norms between them are faster with channels innermost.
        tokens: Tensor = super().forward(images.contiguous(memory_format=torch.channels_last))
        return tokens
