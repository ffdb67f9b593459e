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
from ssl_vit.data.normalize import Normalize
from ssl_vit.model.block import lean_blocks
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.positions import sincos_positions

# Of masked patches and missing pixels in pictures.
_GRAY = 0.5


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
        order: Int64[Tensor, "c n"],
        prefix: int,
        masked_only: bool = False,
        attended: Bool[Tensor, " all"] | None = None,
    ) -> Float[Tensor, "c k w"]:
        """Decoded tokens of all patches, in ``order``: the visible ones first, then the masked.

        Of an image there may be several orders in a row, which begin with the same visible patches.
        ``masked_only``: those of the masked ones, for which the last block has less to do.
        ``attended``: of prefix and patches those that are there, where others are padding.

        The tokens stay in shuffled order, each with the position of its patch. Attention does not
        see the order, so this equals restoring the order first, and saves the two shuffles.
        """
        x = self.embed(latent).repeat_interleave(len(order) // len(latent), dim=0)
        n_masked = order.shape[1] - (latent.shape[1] - prefix)
        masks = self.mask_token.to(x.dtype).expand(x.shape[0], n_masked, -1)
        tokens = torch.cat([x[:, prefix:], masks], dim=1) + self.positions[order]
        tokens = torch.cat([x[:, :prefix].to(tokens.dtype), tokens], dim=1)
        for block in self.blocks[:-1]:
            tokens = block(tokens, attended=attended)
        wanted = slice(latent.shape[1] if masked_only else prefix, None)
        return self.norm(self.blocks[-1](tokens, rows=wanted, attended=attended))


def patch_statistics(
    patches: Float[Tensor, "b n ppc"], valid: Bool[Tensor, "b n ppc"] | None = None
) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Mean and standard deviation (unbiased, 1e-6 added to the variance) of each patch.

    ``valid``: the values that count; None: all. A patch with none has the mean 0, and one with less
    than two the variance 0.
    """
    if valid is None:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()
    count = valid.sum(-1, keepdim=True)
    mean = (patches * valid).sum(-1, keepdim=True) / count.clamp(min=1)
    squares = ((patches - mean) * valid).square().sum(-1, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1) + 1e-6).sqrt()


def mean_of_valid(
    errors: Float[Tensor, "b n ppc"], valid: Bool[Tensor, "b n ppc"]
) -> Float[Tensor, ""]:
    """Mean of the errors whose target is valid; 0 where none is."""
    return (errors * valid).sum() / valid.sum().clamp(min=1)


def without_data(valid: Bool[Tensor, "b n ppc"]) -> Bool[Tensor, "b n"]:
    """Patches of which no value is valid: they have nothing to show, or to be predicted."""
    return ~valid.any(-1)


def visible_first(
    noise: Float[Tensor, "b n"], valid: Bool[Tensor, "b n ppc"] | None
) -> Int64[Tensor, "b n"]:
    """Order of patches, of which the encoder sees the first ones: by their noise (0 <= noise < 1).

    ``valid``: their values that are there (None: all); patches without any come last, so that they
    are seen only where there are too few others.
    """
    if valid is not None:
        noise = noise + without_data(valid)
    return noise.argsort(dim=1, stable=True)


def explained_shares(
    patches: Float[Tensor, "b n ppc"],
    prediction: Float[Tensor, "b n ppc"],
    hidden: Bool[Tensor, "b n"],
    valid: Bool[Tensor, "b n ppc"] | None = None,
) -> dict[str, float]:
    """The share of the masked patches' target that a prediction explains, for each target.

    ``pixels`` and ``normalized``: 1 - (mean squared error) / (mean square about the target's mean),
    as if the decoder had been trained on that. One of another target explains nothing: less than 0.
    ``valid``: the values that count; None: all.
    """
    mean, std = patch_statistics(patches, valid)
    targets = {"pixels": patches, "normalized": (patches - mean) / std}
    counted = hidden[:, :, None].expand_as(patches)
    counted = counted if valid is None else counted & valid
    shares = {}
    for name, target in targets.items():
        wanted, given = target[counted].double(), prediction[counted].double()
        about_mean = (wanted - wanted.mean()).square().mean().clamp(min=1e-12)
        shares[name] = 1 - float((given - wanted).square().mean() / about_mean)
    return shares


def masked_pictures(
    encoder: Encoder,
    images: Float[Tensor, "b c h w"],
    prediction: Float[Tensor, "b n ppc"],
    hidden: Bool[Tensor, "b n"],
    normalize: Normalize,
    missing: Bool[Tensor, "b c h w"] | None = None,
) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
    """Original, masked image, prediction, and reconstruction: the masked patches as predicted.

    ``images`` and ``prediction`` (of all patches, as pixels) are normalised; the inverse of
    ``normalize`` shows them. Pixels that are ``missing`` are gray in the original and in what is
    seen of it.
    """
    grid, over = encoder.grid_of(images), hidden[:, :, None]
    shown = normalize.inverse(images)
    shown = shown if missing is None else shown.masked_fill(missing, _GRAY)
    predicted = normalize.inverse(encoder.unpatchify(prediction.to(images.dtype), grid))
    seen = encoder.patchify(shown)
    masked = torch.where(over, _GRAY, seen)
    pasted = torch.where(over, encoder.patchify(predicted), seen)
    return {
        "original": to_rgb(shown),
        "masked": to_rgb(encoder.unpatchify(masked, grid)),
        "prediction": to_rgb(predicted),
        "reconstruction": to_rgb(encoder.unpatchify(pasted, grid)),
    }
