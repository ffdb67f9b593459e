"""LeJEPA (Balestriero and LeCun 2025, arXiv 2511.08544): views of an image agree, and projections
are kept an isotropic Gaussian. No teacher, no stop-gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_vit.common.checks import (
    check_divides,
    check_least,
    check_not_negative,
    check_range,
    check_share,
    check_size,
    flag,
    whole_patches,
)
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.task import Scalar, Views, at_least_fp32
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.levels import Levels
from ssl_vit.data.photometric import Photometric
from ssl_vit.methods.base import Method, MethodConfig
from ssl_vit.model.attention import cls_features
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.init import truncated_init
from ssl_vit.objectives.base import Objective, Setting
from ssl_vit.objectives.heads import projector
from ssl_vit.objectives.sigreg import invariance, random_directions, sigreg

# Projections of unit variance are the aim; below this share of its deviation they are all alike.
_COLLAPSED = 0.05


@dataclass(frozen=True)
class LeJEPAConfig(MethodConfig):
    """Views of an image agree on projections that are kept an isotropic Gaussian."""

    sigreg_weight: float = 0.05
    """Share of SIGReg in the loss; the rest is the disagreement of views."""
    directions: int = 1024
    """Random directions in which a batch is compared with a Gaussian, new ones at each step."""
    head_depth: int = 3
    """Linear layers of the projector."""
    head_width: int = 2048
    """Features of its hidden layers."""
    head_norm: Literal["batch", "layer"] = "batch"
    """Norms between its layers. batch: by the batch of all processes (all crops together). layer:
    by each crop alone."""
    outputs: int = 64
    """Features of a projection."""
    global_crops: int = 2
    """Crops of each image whose mean projection all its crops are compared with."""
    global_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that a global crop covers, least and most."""
    local_crops: int = 6
    """Small crops of each image. 0: none."""
    local_size: tuple[int, ...] = ()
    """Height and width of a local crop in pixels. Empty: 3/7 of the encoder's image size (96 of
    224), in whole patches."""
    local_scale: tuple[float, float] = (0.05, 0.3)
    """Share of the image's area that a local crop covers, least and most."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip: for images without an up, as of microscopes."""
    quarter_turns: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, each as likely; no pixel is interpolated."""
    jitter: float = 0.8
    """Probability of colour jitter (brightness .4, contrast .4, saturation .2, hue .1)."""
    gray: float = 0.2
    """Probability of turning gray."""
    blur: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, least and most: made for crops of 224 pixels."""
    solarize: float = 0.2
    """Probability of inverting the bright pixels."""
    levels: float = 0.0
    """Probability of another contrast (.4) and brightness (.5 deviations) about the data set's
    mean, for any kind of number: where 0 is not black, in place of jitter."""
    channel_levels: float = 0.0
    """Probability that each channel has a contrast and brightness of its own."""
    drop_channels: float = 0.0
    """Probability of each channel to become its mean; one always stays."""
    noise: float = 0.0
    """Gaussian noise: its largest standard deviation, in those of the data set."""

    def __post_init__(self) -> None:
        check(
            0 <= self.sigreg_weight < 1,
            f"{flag(self, 'sigreg_weight')} is {self.sigreg_weight:g}; it must lie in [0, 1)",
        )
        check_least(self, 1, "directions", "head_depth", "head_width", "outputs", "global_crops")
        check_least(self, 0, "local_crops")
        check(
            self.global_crops + self.local_crops > 1,
            f"{flag(self, 'global_crops')} is 1 and {flag(self, 'local_crops')} 0; an image needs "
            "two crops to agree on",
        )
        check_size(self, "local_size")
        check_range(self, "global_scale", "local_scale")
        check_range(self, "blur_sigma", most=float("inf"))
        check_share(self, "flip", "vertical_flip", "quarter_turns", "jitter", "gray", "solarize")
        check_share(self, "blur", "levels", "channel_levels", "drop_channels")
        check_not_negative(self, "noise")

    @property
    def batch_normed(self) -> bool:
        """Whether the projector has batch norms."""
        return self.head_norm == "batch" and self.head_depth > 1

    def small(self, image: tuple[int, int], patch: int) -> tuple[int, int]:
        """Height and width of a local crop.

        Raises:
            UserError: the patch does not divide what is given.
        """
        if not self.local_size:
            return whole_patches(image[0] * 3 / 7, image[1] * 3 / 7, patch)
        size = (self.local_size[0], self.local_size[-1])
        check_divides(self, "local_size", size, patch)
        return size


class LeJEPAObjective(Objective):
    """Disagreement of an image's views, and SIGReg of each view of a batch."""

    explained: ClassVar[dict[str, Scalar]] = {
        "loss": Scalar("Loss", "Weighted mean of the two below.", True),
        "invariance": Scalar(
            "Disagreement of views", "Mean squared difference from the mean of global views."
        ),
        "sigreg": Scalar(
            "SIGReg", "Distance of projections from an isotropic Gaussian. It falls and stays low."
        ),
        "sigreg_share": Scalar("SIGReg's share of the loss", "Near 1 the views agree already."),
        "spread": Scalar(
            "Spread of projections", "Standard deviation over a batch; 1 is the aim, 0 a collapse."
        ),
    }

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
        """What is of a part of a step only."""
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
    title: ClassVar[str] = "LeJEPA"
    explained: ClassVar[dict[str, Scalar]] = LeJEPAObjective.explained
    pooling: ClassVar[str] = "cls"
    progress: ClassVar[tuple[str, ...]] = ("invariance", "sigreg", "spread")
    splits_with: ClassVar[dict[str, Any]] = {"sigreg_weight": 0.0, "head_norm": "layer"}
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "optim": {"base_lr": 5e-4, "weight_decay": 0.05, "clip": 3.0},
    }

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
