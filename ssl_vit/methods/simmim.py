"""SimMIM: a simple framework for masked image modelling (Xie et al. 2021, arXiv 2111.09886)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.task import Views, at_least_fp32
from ssl_vit.data.augment import ViewSpec, one_crop
from ssl_vit.data.loader import draw_samples
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.base import Method
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.init import truncated_init
from ssl_vit.objectives.base import Objective, Reconstruction
from ssl_vit.objectives.masked_patches import masked_pictures, mean_of_valid, without_data
from ssl_vit.objectives.masks import random_units
from ssl_vit.options.base import Defaults, Target
from ssl_vit.options.simmim import DEFAULTS, EXPLAINED, TITLE, SimMIMConfig


class SimMIMObjective(Objective):
    """Mean absolute error of the masked patches' pixels, of which the encoder sees mask tokens."""

    def __init__(self, config: SimMIMConfig, encoder: Encoder) -> None:
        super().__init__()
        encoder.check_apart()
        self.config = config
        self.mask_token = nn.Parameter(torch.zeros(encoder.width))
        self.predict_pixels = nn.Linear(encoder.width, encoder.patch_size**2 * encoder.channels)

    def forward(self, encoder: Encoder, views: Views, step: int) -> dict[str, Tensor]:
        """The loss of a batch, each image masked as its worker drew it."""
        return {
            "loss": self.loss(encoder, views.crops[0], views.drawn["masked"], views.missing_of(0))
        }

    def loss(
        self,
        encoder: Encoder,
        images: Float[Tensor, "b c h w"],
        masked: Bool[Tensor, "b n"],
        missing: Bool[Tensor, "b c h w"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean of |prediction - pixel| over the pixels of masked patches, in this part of a batch.

        Pixels that are ``missing`` (None: none) are no target, and a patch of which all are is
        masked, too; the loss is 0 where there is no target.
        """
        valid = None if missing is None else encoder.patchify(~missing)
        masked = masked if valid is None else masked | without_data(valid)
        error = (self.predict(encoder, images, masked) - encoder.patchify(images)).abs()
        if valid is None:
            return (error.mean(2) * masked).sum() / masked.sum()
        return mean_of_valid(error, valid & masked[:, :, None])

    def predict(
        self, encoder: Encoder, images: Float[Tensor, "b c h w"], masked: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b n ppc"]:
        """Pixels of all patches, in the order of ``Encoder.patchify``."""
        tokens = encoder.encode(encoder.embed(images, masked=masked, token=self.mask_token))
        return at_least_fp32(self.predict_pixels(tokens[:, encoder.vit.num_prefix_tokens :]))

    @torch.no_grad()
    def reconstruct(
        self,
        encoder: Encoder,
        images: Float[Tensor, "b c h w"],
        keys: Int64[Tensor, " b"],
        normalize: Normalize,
        mask_ratio: float = 0.0,
        target: Target = "auto",
        missing: Bool[Tensor, "b c h w"] | None = None,
    ) -> Reconstruction:
        """Reconstruction as in the base; the target is raw pixels."""
        check(target != "normalized", "--target is normalized; SimMIM predicts pixels")
        self.config.check_grid(encoder.grid, mask_ratio)
        config = replace(self.config, mask_ratio=mask_ratio or self.config.mask_ratio)
        draw = partial(SimMIM.draw, config, encoder.grid)
        masked = draw_samples(draw, keys.tolist())["masked"].to(images.device)
        n, hidden = masked.shape[1], int(masked[0].sum())
        if missing is not None:
            masked = masked | without_data(encoder.patchify(~missing))
        prediction = self.predict(encoder, images, masked)
        caption = f"target: raw pixels. {hidden} of {n} patches are masked."
        pictures = masked_pictures(encoder, images, prediction, masked, normalize, missing)
        return Reconstruction(pictures, caption)


class SimMIM(Method):
    """The encoder sees all patches, mask tokens among them; one linear layer predicts pixels."""

    Config: ClassVar[type] = SimMIMConfig
    title, explained = TITLE, EXPLAINED
    reconstructs: ClassVar[bool] = True
    # The original's rate is 1e-4 for 512 images.
    defaults: ClassVar[Defaults] = DEFAULTS

    def __init__(self, config: SimMIMConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        config.check_grid(self.encoder.grid)
        objective = SimMIMObjective(config, self.encoder)
        truncated_init(self.encoder, objective)
        nn.init.trunc_normal_(objective.mask_token, std=0.02)
        self.add("simmim", objective)

    @staticmethod
    def views(config: SimMIMConfig, encoder: Encoder) -> ViewSpec:
        """One random resized crop, perhaps flipped and turned."""
        return one_crop(encoder.image_size, config)

    @staticmethod
    def draw(
        config: SimMIMConfig, grid: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """``masked`` (N,): True where a patch is hidden."""
        return {"masked": random_units(grid, config.mask_unit, config.mask_ratio, rng)}
