"""Masked patches: a light decoder, targets, and pictures of what is predicted of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_vit.common.figures import to_rgb
from ssl_vit.data.augment import Normalize
from ssl_vit.model.block import lean_blocks
from ssl_vit.model.encoder import Encoder, sincos_positions


class Decoder(nn.Module):
    """The light decoder of MAE: a narrow ViT over visible latents and mask tokens, to pixels.

    Args:
        width: of the encoder's tokens; ``dim``, ``depth`` and ``heads`` are the decoder's own.
        grid: rows and columns of patches.
        outputs: numbers predicted of a patch: its pixels, or features.
    """

    positions: Tensor

    def __init__(
        self, width: int, dim: int, depth: int, heads: int, grid: tuple[int, int], outputs: int
    ) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        lean_blocks(self.blocks)
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, outputs)
        self.register_buffer("positions", sincos_positions(grid, dim), persistent=False)

    def forward(
        self,
        latent: Float[Tensor, "b m d"],
        order: Int64[Tensor, "b n"],
        prefix: int,
        masked_only: bool = False,
    ) -> Float[Tensor, "b k w"]:
        """Decoded tokens of all patches, in ``order``: the visible ones first, then the masked.

        ``masked_only``: those of the masked ones, for which the last block has less to do.

        The tokens stay in shuffled order, each with the position of its patch. Attention does not
        see the order, so this equals restoring the order first, and saves the two shuffles.
        """
        x = self.embed(latent)
        n_masked = order.shape[1] - (latent.shape[1] - prefix)
        masks = self.mask_token.to(x.dtype).expand(x.shape[0], n_masked, -1)
        tokens = torch.cat([x[:, prefix:], masks], dim=1) + self.positions[order]
        tokens = torch.cat([x[:, :prefix].to(tokens.dtype), tokens], dim=1)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        wanted = slice(latent.shape[1] if masked_only else prefix, None)
        return self.norm(self.blocks[-1](tokens, rows=wanted))


def patch_statistics(
    patches: Float[Tensor, "b n ppc"],
) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Mean and standard deviation (unbiased, 1e-6 added to the variance) of each patch."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def explained_shares(
    patches: Float[Tensor, "b n ppc"],
    prediction: Float[Tensor, "b n ppc"],
    hidden: Bool[Tensor, "b n"],
) -> dict[str, float]:
    """The share of the masked patches' target that a prediction explains, for each target.

    ``pixels`` and ``normalized``: 1 - (mean squared error) / (mean square about the target's mean),
    as if the decoder had been trained on that. One of another target explains nothing: less than 0.
    """
    mean, std = patch_statistics(patches)
    targets = {"pixels": patches, "normalized": (patches - mean) / std}
    shares = {}
    for name, target in targets.items():
        wanted, given = target[hidden].double(), prediction[hidden].double()
        about_mean = (wanted - wanted.mean()).square().mean().clamp(min=1e-12)
        shares[name] = 1 - float((given - wanted).square().mean() / about_mean)
    return shares


def masked_pictures(
    encoder: Encoder,
    images: Float[Tensor, "b c h w"],
    prediction: Float[Tensor, "b n ppc"],
    hidden: Bool[Tensor, "b n"],
    normalize: Normalize,
) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
    """Original, masked image, prediction, and reconstruction: the masked patches as predicted.

    ``images`` and ``prediction`` (of all patches, as pixels) are normalised; the inverse of
    ``normalize`` shows them.
    """
    grid, over = encoder.grid_of(images), hidden[:, :, None]
    patches = encoder.patchify(images)
    prediction = prediction.to(patches.dtype)
    pasted = torch.where(over, prediction, patches)
    shown = normalize.inverse(images)
    masked = torch.where(over, 0.5, encoder.patchify(shown))
    return {
        "original": to_rgb(shown),
        "masked": to_rgb(encoder.unpatchify(masked, grid)),
        "prediction": to_rgb(normalize.inverse(encoder.unpatchify(prediction, grid))),
        "reconstruction": to_rgb(normalize.inverse(encoder.unpatchify(pasted, grid))),
    }
