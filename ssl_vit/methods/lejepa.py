"""LeJEPA (Balestriero and LeCun 2025, arXiv 2511.08544): views of an image agree, and projections
are kept an isotropic Gaussian. No teacher, no stop-gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.common.checks import (
    flag,
)
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.task import Views, at_least_fp32
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.levels import Levels
from ssl_vit.data.photometric import Photometric
from ssl_vit.methods.base import Method
from ssl_vit.model.attention import cls_features
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.init import truncated_init
from ssl_vit.objectives.base import Objective, Setting
from ssl_vit.objectives.heads import projector
from ssl_vit.objectives.sigreg import invariance, random_directions, sigreg
from ssl_vit.options.base import Defaults
from ssl_vit.options.lejepa import DEFAULTS, EXPLAINED, TITLE, LeJEPAConfig

# Projections of unit variance are the aim; below this share of its deviation they are all alike.
_COLLAPSED = 0.05


class LeJEPAObjective(Objective):
    """Disagreement of an image's views, and SIGReg of each view of a batch."""

    def __init__(self, config: LeJEPAConfig, encoder: Encoder) -> None:
        super().__init__()
        check(
            encoder.vit.cls_token is not None,
            f"--encoder.arch is {encoder.config.arch!r}; LeJEPA projects [CLS], which it lacks",
        )
        self.config = config
        hidden = [config.head_width] * (config.head_depth - 1)
        self.head = projector([encoder.width, *hidden, config.outputs], config.head_norm)

    def forward(self, encoder: Encoder, views: Views, step: int) -> dict[str, Tensor]:
        """The losses of a batch."""
        c, images = self.config, len(views.keys)
        # Each resolution goes through the encoder once, all its crops together.
        seen = torch.cat([cls_features(encoder, crops) for crops in views.crops])
        projections = at_least_fp32(self.head(seen)).unflatten(0, (-1, images))
        with torch.autocast(seen.device.type, enabled=False):
            directions = random_directions(step, c.outputs, c.directions, seen.device)
            agree = invariance(projections, c.global_crops)
            apart = sigreg(projections, directions)
        loss = (1 - c.sigreg_weight) * agree + c.sigreg_weight * apart
        share = c.sigreg_weight * apart / loss.clamp(min=torch.finfo(loss.dtype).tiny)
        spread = self._spread(projections.detach())
        found = {"invariance": agree, "sigreg": apart, "sigreg_share": share}
        return {"loss": loss, **{k: v.detach() for k, v in found.items()}, "spread": spread}

    @staticmethod
    def _spread(projections: Float[Tensor, "v n d"]) -> Float[Tensor, ""]:
        return projections.var(1, unbiased=False).mean().sqrt()

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """Projections that are all alike."""
        if means["spread"] >= _COLLAPSED:
            return {}
        return {
            "collapse": f"the projections of all images are alike (spread {means['spread']:.3f} of "
            f"1). Usual remedies: a higher {flag(self.config, 'sigreg_weight')}, a lower --optim.lr"
        }

    def advice(self, setting: Setting) -> list[str]:
        """Advice on terms that are computed on a part of a step only."""
        c, each = self.config, setting.batch_size // setting.parts
        of_part = []
        if c.sigreg_weight:
            of_part.append(f"SIGReg ({flag(c, 'sigreg_weight')} {c.sigreg_weight:g})")
        if c.batch_normed:
            of_part.append(f"the projector's norm ({flag(c, 'head_norm')} batch)")
        if setting.parts == 1 or not of_part:
            return []
        return [
            f"{' and '.join(of_part)}: of the {each} images of each of the {setting.parts} parts "
            "of --optim.accumulate, not of the whole batch"
        ]


class LeJEPA(Method):
    """Views of an image agree; in every direction a batch is spread as a Gaussian is."""

    Config: ClassVar[type] = LeJEPAConfig
    title, explained = TITLE, EXPLAINED
    pooling: ClassVar[str] = "cls"
    progress: ClassVar[tuple[str, ...]] = ("invariance", "sigreg", "spread")
    splits_with: ClassVar[dict[str, Any]] = {"sigreg_weight": 0.0, "head_norm": "layer"}
    defaults: ClassVar[Defaults] = DEFAULTS

    def __init__(self, config: LeJEPAConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        config.small(self.encoder.image_size, self.encoder.patch_size)
        objective = LeJEPAObjective(config, self.encoder)
        truncated_init(self.encoder, objective.head)
        if config.batch_normed:
            self._fix_last_bias()
        self.add("lejepa", objective)

    def _fix_last_bias(self) -> None:
        """Leave the encoder's last bias as it is: the projector's first norm takes away what all
        [CLS] share, and AdamW would follow the rounding that is left of the bias's gradient."""
        norm = self.encoder.vit.norm
        if isinstance(norm, nn.LayerNorm):
            norm.bias.requires_grad_(False)

    @staticmethod
    def views(config: LeJEPAConfig, encoder: Encoder) -> ViewSpec:
        """Global crops, then local ones; all are augmented alike."""
        photometric = Photometric(
            jitter=config.jitter,
            gray=config.gray,
            blur=config.blur,
            blur_sigma=config.blur_sigma,
            solarize=config.solarize,
        )

        levels = Levels(config.levels, config.channel_levels, config.drop_channels, config.noise)

        def crop(size: tuple[int, int], scale: tuple[float, float], count: int) -> Crop:
            return Crop(
                size,
                scale,
                flip=config.flip,
                count=count,
                photometric=photometric,
                vertical_flip=config.vertical_flip,
                quarter_turns=config.quarter_turns,
                levels=levels,
            )

        crops = [crop(encoder.image_size, config.global_scale, config.global_crops)]
        if config.local_crops:
            small = config.small(encoder.image_size, encoder.patch_size)
            crops.append(crop(small, config.local_scale, config.local_crops))
        return ViewSpec(tuple(crops))
