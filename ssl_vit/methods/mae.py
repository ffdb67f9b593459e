"""Masked autoencoder (He et al. 2022, arXiv 2111.06377)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig, check
from ssl_vit.common.figures import picture_rows, to_rgb
from ssl_vit.common.seeds import uniform
from ssl_vit.common.task import Views, at_least_fp32
from ssl_vit.data.augment import Crop, Normalize, ViewSpec
from ssl_vit.methods.base import Method
from ssl_vit.model.block import lean_blocks
from ssl_vit.model.encoder import Encoder, sincos_positions, take


@dataclass(frozen=True)
class MAEConfig:
    """Masked autoencoder: hide most patches of an image, predict their pixels."""

    mask_ratio: float = 0.75
    """Share of the patches that is hidden, per image at random."""
    normalize_target: bool = True
    """Predict each patch normalised by its own mean and variance, rather than raw pixels."""
    decoder_width: int = 512
    """Features of a decoder token."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of each decoder block."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers, least and most."""
    flip: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        ratio = self.mask_ratio
        check(0 < ratio < 1, f"--method.mask-ratio is {ratio}; it must lie between 0 and 1")
        for option in ("decoder_width", "decoder_depth", "decoder_heads"):
            value = getattr(self, option)
            check(value >= 1, f"--method.{option.replace('_', '-')} is {value}; at least 1")
        check(
            self.decoder_width % self.decoder_heads == 0,
            f"--method.decoder-heads is {self.decoder_heads}; "
            f"it must divide --method.decoder-width, {self.decoder_width}",
        )
        low, high = self.crop_scale
        check(
            0 < low <= high <= 1,
            f"--method.crop-scale is {self.crop_scale}; 0 < least <= most <= 1",
        )
        check(0 <= self.flip <= 1, f"--method.flip is {self.flip}; it is a probability")


class Decoder(nn.Module):
    """The light decoder: a narrow ViT over visible latents and mask tokens, to pixels."""

    positions: Tensor

    def __init__(self, config: MAEConfig, width: int, grid: tuple[int, int], pixels: int) -> None:
        super().__init__()
        dim = config.decoder_width
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.decoder_heads, qkv_bias=True, norm_layer=norm)
            for _ in range(config.decoder_depth)
        )
        lean_blocks(self.blocks)
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, pixels)
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


class MAE(Method):
    """Encodes the visible patches only and predicts the pixels of the masked ones."""

    Config: ClassVar[type] = MAEConfig
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "encoder": {"positions": "sincos"},
        "optim": {"betas": (0.9, 0.95), "base_lr": 1.5e-4, "weight_decay": 0.05},
    }

    def __init__(self, config: MAEConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        self.config: MAEConfig = config
        encoder = self.encoder
        n = encoder.grid[0] * encoder.grid[1]
        self.n_visible = int(n * (1 - config.mask_ratio))
        check(
            1 <= self.n_visible < n,
            f"--method.mask-ratio is {config.mask_ratio}; of {n} patches it leaves "
            f"{self.n_visible} visible, and at least 1 must be visible and 1 masked",
        )
        self.decoder = Decoder(
            config, encoder.width, encoder.grid, encoder.patch_size**2 * channels
        )
        self._init_weights()

    def _init_weights(self) -> None:
        """The original's: Xavier-uniform linear maps, zero biases, tokens normal with σ = .02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.encoder.vit.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        for token in (self.encoder.vit.cls_token, self.encoder.vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    @staticmethod
    def views(config: MAEConfig, encoder: Encoder) -> ViewSpec:
        """One random resized crop, bicubic, perhaps flipped."""
        return ViewSpec((Crop(encoder.image_size, scale=config.crop_scale, flip=config.flip),))

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """The loss of a batch, each image masked by its own key."""
        images = views.crops[0]
        n = self.encoder.grid[0] * self.encoder.grid[1]
        return {"loss": self.loss(images, uniform(views.keys, n))}

    def loss(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]
    ) -> Float[Tensor, ""]:
        """Mean squared error of the masked patches' pixels.

        ``noise`` decides what is kept: the patches with the ``n_visible`` smallest numbers.
        """
        order = noise.argsort(dim=1, stable=True)
        # What the loss does not use is not computed: it is of masked patches.
        tokens = self.decode(self.encode_visible(images, order), order, masked_only=True)
        prediction = at_least_fp32(self.decoder.predict(tokens))
        target = self.target(take(self.encoder.patchify(images), order[:, self.n_visible :]))
        return (prediction - target).square().mean()

    def encode_visible(
        self, images: Float[Tensor, "b c h w"], order: Int64[Tensor, "b n"]
    ) -> Float[Tensor, "b m d"]:
        """Encoder output of the visible patches, prefix tokens first."""
        return self.encoder.encode(self.encoder.embed(images, order[:, : self.n_visible]))

    def decode(
        self,
        latent: Float[Tensor, "b m d"],
        order: Int64[Tensor, "b n"],
        masked_only: bool = False,
    ) -> Float[Tensor, "b k w"]:
        """Decoder tokens of all patches, or of the masked ones alone, in ``order``."""
        return self.decoder(latent, order, self.encoder.vit.num_prefix_tokens, masked_only)

    def target(self, patches: Float[Tensor, "b n ppc"]) -> Float[Tensor, "b n ppc"]:
        """What is to be predicted of patches: their pixels; normalised by each patch's own mean and
        unbiased variance if so set."""
        if not self.config.normalize_target:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def predict(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n ppc"], Float[Tensor, "b n"]]:
        """Predictions for all patches in image order, and the mask (1 where masked)."""
        order = noise.argsort(dim=1, stable=True)
        tokens = self.decode(self.encode_visible(images, order), order)
        restore = order.argsort(dim=1)
        masked = torch.arange(order.shape[1], device=order.device)[None] >= self.n_visible
        mask = masked.expand_as(order).gather(1, restore).to(noise.dtype)
        return at_least_fp32(self.decoder.predict(take(tokens, restore))), mask

    def panels(self, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
        """Rows of original, masked image, and reconstruction with the visible patches pasted in."""
        n = self.encoder.grid[0] * self.encoder.grid[1]
        columns = self.pictures(views.crops[0], uniform(views.keys, n), normalize)
        del columns["prediction"]
        return {"reconstruction": picture_rows(columns, self.target_shown)}

    @property
    def target_shown(self) -> str:
        """What is predicted, and how that is made pixels, for a caption."""
        if self.config.normalize_target:
            return "target: normalised patches, shown with each patch's true mean and std"
        return "target: raw pixels"

    @torch.no_grad()
    def pictures(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"], normalize: Normalize
    ) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
        """Original, masked image, prediction, and reconstruction: the masked patches as predicted.

        ``prediction`` is of all patches, of which the loss knows the masked ones only. A normalised
        target is brought back to pixels with each patch's true mean and standard deviation.
        """
        prediction, mask = self.predict(images, noise)
        patches = self.encoder.patchify(images)
        if self.config.normalize_target:
            mean, std = patch_statistics(patches)
            prediction = prediction * std + mean
        hidden = mask[:, :, None] > 0
        prediction = prediction.to(patches.dtype)
        pasted = torch.where(hidden, prediction, patches)
        shown = normalize.inverse(images)
        masked = torch.where(hidden, 0.5, self.encoder.patchify(shown))
        return {
            "original": to_rgb(shown),
            "masked": to_rgb(self._unpatchify(masked)),
            "prediction": to_rgb(normalize.inverse(self._unpatchify(prediction))),
            "reconstruction": to_rgb(normalize.inverse(self._unpatchify(pasted))),
        }

    def _unpatchify(self, patches: Float[Tensor, "b n ppc"]) -> Float[Tensor, "b c h w"]:
        """The inverse of ``Encoder.patchify`` on the encoder's own grid."""
        h, w = self.encoder.grid
        p = self.encoder.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)


def patch_statistics(
    patches: Float[Tensor, "b n ppc"],
) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Mean and standard deviation (unbiased, 1e-6 added to the variance) of each patch."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
