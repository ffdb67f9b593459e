"""Distillation of features: a small encoder learns a given one's features of an image and of its
patches, on images without labels (Hinton et al. 2015; of features, Romero et al. 2015)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.checks import (
    check_divides,
    flag,
    whole_patches,
)
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check, naming_option
from ssl_vit.common.task import Views, at_least_fp32
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.levels import Levels
from ssl_vit.data.photometric import Photometric
from ssl_vit.methods.base import Method
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder, Features
from ssl_vit.model.init import truncated_init
from ssl_vit.objectives.base import Objective
from ssl_vit.objectives.frozen import Frozen
from ssl_vit.objectives.gram import resized_patches
from ssl_vit.objectives.masked_patches import without_data
from ssl_vit.options.base import Defaults
from ssl_vit.options.distill import DEFAULTS, EXPLAINED, TITLE, DistillConfig, Loss
from ssl_vit.weights.adapting import adapted
from ssl_vit.weights.exchange import EncoderInfo, load_strictly
from ssl_vit.weights.official import open_weights, weights_info

log = logging.getLogger("ssl_vit")


def teacher_info(config: DistillConfig) -> EncoderInfo:
    """Description of the teacher, without its weights.

    Raises:
        UserError: none is given, or it cannot be opened.
    """
    option = flag(config, "teacher")
    check(bool(config.teacher), f"{option} is empty; give a run folder or a weight file")
    with naming_option(option, config.teacher):
        return weights_info(config.teacher, option=option)[0]


def seen_size(config: DistillConfig, image: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which the teacher sees a crop of which the student sees ``image``.

    Raises:
        UserError: no teacher, or a size that its patch does not divide.
    """
    info = teacher_info(config)
    with without_memory():
        patch = Encoder(info.config, info.channels).patch_size
    if not config.teacher_size:
        return whole_patches(float(image[0]), float(image[1]), patch)
    size = (config.teacher_size[0], config.teacher_size[-1])
    check_divides(config, "teacher_size", size, patch, "the teacher's")
    return size


def feature_loss(
    found: Float[Tensor, "*b d"], wanted: Float[Tensor, "*b d"], kind: Loss
) -> Float[Tensor, "*b"]:
    """Loss of features, one number each; see ``DistillConfig.loss``."""
    found, wanted = at_least_fp32(found), at_least_fp32(wanted)
    if kind == "cosine":
        return 1 - F.cosine_similarity(found, wanted, dim=-1)
    wanted = F.layer_norm(wanted, wanted.shape[-1:])
    each = F.mse_loss if kind == "mse" else F.smooth_l1_loss
    return each(found, wanted, reduction="none").mean(-1)


class DistillObjective(Objective):
    """Distance of a student's features, through linear heads, from a frozen teacher's."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: DistillConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.info = config, teacher_info(config)
        size, channels = seen_size(config, encoder.image_size), encoder.channels
        made = replace(self.info.config, image_size=size, drop_path=0.0)
        teacher = Encoder(made, channels)
        teacher.augmented = False
        self.cls_head = nn.Linear(encoder.width, teacher.width)
        self.patch_head = nn.Linear(encoder.width, teacher.width)
        if not self.cls_head.weight.is_meta:
            self._open(teacher)
        self.teacher = Frozen(teacher)
        self.register_buffer("scale", torch.ones(1, channels, 1, 1), persistent=False)
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1), persistent=False)

    def _open(self, teacher: Encoder) -> None:
        where = self.config.where
        given = open_weights(self.config.teacher)
        state, notes = adapted(given.encoder, teacher, "mean", where)
        load_strictly(teacher.vit, state, where)
        log.info("teacher from %s: %s", given.path, "; ".join([given.report, *notes]))

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """The teacher sees images normalised by its own statistics, whatever the student does."""
        if self.info.channels != len(mean):
            return
        own, theirs = (
            torch.tensor([mean, std]),
            torch.tensor([self.info.mean, self.info.std]),
        )
        self.scale.copy_((own[1] / theirs[1]).view(1, -1, 1, 1))
        self.shift.copy_(((own[0] - theirs[0]) / theirs[1]).view(1, -1, 1, 1))

    def forward(self, encoder: Encoder, views: Views, step: int) -> dict[str, Tensor]:
        """The losses of a batch."""
        c, crop = self.config, views.crops[0]
        wanted = self._of_teacher(crop)
        seen = encoder(_resized(crop, encoder.image_size))
        cls = self.cls_head(_image_feature(seen))
        target = _image_feature(wanted)
        found = {"cls_loss": feature_loss(cls, target, c.loss).mean()}
        patches = resized_patches(at_least_fp32(wanted.patches), wanted.grid, seen.grid)
        each = feature_loss(self.patch_head(seen.patches), patches, c.loss)
        found["patch_loss"] = self._mean(each, encoder, views)
        loss = c.cls_weight * found["cls_loss"] + c.patch_weight * found["patch_loss"]
        cosine = F.cosine_similarity(at_least_fp32(cls), at_least_fp32(target), dim=-1).mean()
        found = {name: value.detach() for name, value in {**found, "cls_cosine": cosine}.items()}
        return {"loss": loss, **found}

    @torch.no_grad()
    def _of_teacher(self, crop: Float[Tensor, "b c h w"]) -> Features:
        teacher = self.teacher.encoder
        features: Features = teacher(_resized(crop * self.scale + self.shift, teacher.image_size))
        return features

    @staticmethod
    def _mean(each: Float[Tensor, "b n"], encoder: Encoder, views: Views) -> Float[Tensor, ""]:
        """Mean over patches, of those that have data."""
        missing = views.missing_of(0)
        if missing is None:
            return each.mean()
        least = F.interpolate((~missing).to(each.dtype), size=encoder.image_size, mode="area")
        valid = ~without_data(encoder.patchify(least > 0))
        return (each * valid).sum() / valid.sum().clamp(min=1)


def _image_feature(features: Features) -> Float[Tensor, "b d"]:
    return features.pool("mean") if features.cls is None else features.cls


def _resized(
    images: Float[Tensor, "b c h w"], size: tuple[int, int]
) -> Float[Tensor, "b c height width"]:
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


class Distill(Method):
    """A student learns a given encoder's features of images and patches."""

    Config: ClassVar[type] = DistillConfig
    title, explained = TITLE, EXPLAINED
    pooling: ClassVar[str] = "cls"
    progress: ClassVar[tuple[str, ...]] = ("cls_loss", "patch_loss", "cls_cosine")
    encoders: ClassVar[tuple[str, ...]] = ("teacher",)
    defaults: ClassVar[Defaults] = DEFAULTS

    def __init__(self, config: DistillConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        check(
            self.encoder.vit.cls_token is not None,
            f"--encoder.arch is {encoder_config.arch!r}; a student learns by [CLS], which it lacks",
        )
        objective = DistillObjective(config, self.encoder)
        truncated_init(self.encoder, objective.cls_head, objective.patch_head)
        self.add("distill", objective)

    @staticmethod
    def views(config: DistillConfig, encoder: Encoder) -> ViewSpec:
        """One random resized crop, as large as the larger of the two sees it."""
        seen = seen_size(config, encoder.image_size)
        height, width = (max(pair) for pair in zip(seen, encoder.image_size, strict=True))
        crop = Crop(
            (height, width),
            scale=config.crop_scale,
            flip=config.flip,
            vertical_flip=config.vertical_flip,
            quarter_turns=config.quarter_turns,
            photometric=Photometric(jitter=config.jitter),
            levels=Levels(config.levels, config.channel_levels),
        )
        return ViewSpec((crop,))
