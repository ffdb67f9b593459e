"""Self-distillation without labels, DINO (Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

import logging
import math
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_vit.common.checks import (
    flag,
)
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.figures import to_rgb
from ssl_vit.common.schedules import Length, warmup_cosine
from ssl_vit.common.task import Views
from ssl_vit.data.augment import Crop, Phase, ViewSpec
from ssl_vit.data.levels import Levels
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.photometric import Photometric
from ssl_vit.methods.base import Method
from ssl_vit.model.attention import attention_panel, cls_attention, cls_features
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.init import truncated_init
from ssl_vit.objectives.base import Objective, Setting
from ssl_vit.objectives.centering import Center
from ssl_vit.objectives.cross_entropy import cross_entropy_of_views
from ssl_vit.objectives.ema import Teacher
from ssl_vit.objectives.heads import ProjectionHead
from ssl_vit.options.base import Defaults
from ssl_vit.options.dino import DEFAULTS, EXPLAINED, TITLE, DINOConfig

log = logging.getLogger("ssl_vit")
# Above this share of the largest entropy the teacher cannot distinguish images.
_UNIFORM = 0.99
# Fewer prototypes in use than this are one; not checked on fewer images, which may share one.
_ONE_PROTOTYPE, _ENOUGH_IMAGES = 1.5, 16
# Smaller batches of so many images want a teacher that moves less than this one, step by step.
_SMALL_BATCH, _MANY_IMAGES, _FAST_TEACHER = 512, 100_000, 0.998


class DINOObjective(Objective):
    """Cross-entropy between outputs of teacher and student for different crops of an image."""

    def __init__(self, config: DINOConfig, encoder: Encoder) -> None:
        super().__init__()
        check(
            encoder.vit.cls_token is not None,
            f"--encoder.arch is {encoder.config.arch!r}; DINO learns by [CLS], which it lacks",
        )
        self.config = config
        self.build(encoder)
        self.images = 0
        self.set_length(1, 1)

    def build(self, encoder: Encoder) -> None:
        """The student's head, and the centre."""
        c = self.config
        widths = [encoder.width, *[c.head_width] * (c.head_depth - 1), c.bottleneck]
        self.head: nn.Module = ProjectionHead(widths, c.prototypes, fixed_gain=c.norm_last_layer)
        self.center = Center(c.prototypes, c.center_momentum)

    def add_teacher(self, encoder: Encoder) -> None:
        """Copy the student, whose first weights are drawn by now."""
        self.teacher = Teacher(encoder, self.head)

    def encoder_replaced(self, encoder: Encoder) -> None:
        """Student and teacher start equal."""
        self.teacher.start_from(encoder)

    def set_length(self, steps: int, steps_per_epoch: int) -> None:
        """Resolve what depends on the length of the training."""
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        c = self.config
        freeze = Length.parse(c.freeze_last_layer, flag(c, "freeze_last_layer"))
        self.freeze_steps = freeze.steps(steps_per_epoch)
        if 1 < steps <= self.freeze_steps:
            log.warning(
                "%s is %s, the whole training: the prototypes never move",
                flag(c, "freeze_last_layer"),
                c.freeze_last_layer,
            )
        if steps > 1 and any(e.steps(steps_per_epoch) >= steps for e, _ in c.parsed_phases()):
            log.warning(
                "%s is %s, to the end of the training: larger crops are never seen",
                flag(c, "phases"),
                " ".join(c.phases),
            )
        self.temp_warmup = Length.parse(c.teacher_temp_warmup, flag(c, "teacher_temp_warmup"))

    def teacher_temp(self, step: int) -> float:
        """Temperature at a step, counted from 0: linear, by epoch or by step, then constant."""
        return self.warmed(self.config.teacher_temp_start, self.config.teacher_temp, step)

    def warmed(self, start: float, end: float, step: int) -> float:
        """A temperature that rises from ``start`` to ``end`` as :meth:`teacher_temp` does."""
        span = self.temp_warmup
        n = math.ceil(span.amount)
        i = step // self.steps_per_epoch if span.unit == "ep" else step
        return end if i >= n else start + (end - start) * i / max(1, n - 1)

    def teacher_momentum(self, step: int) -> float:
        """The share of itself that the teacher keeps at a step, from 0: half a cosine up to 1."""
        return warmup_cosine(step, warmup=0, total=self.steps, peak=self.config.momentum, end=1.0)

    def forward(self, encoder: Encoder, views: Views, step: int) -> dict[str, Tensor]:
        """The loss of a batch and, of the same outputs, what shows a collapse."""
        self.images = batch = len(views.keys)
        both = torch.cat(views.crops[:2])
        with torch.no_grad():
            output = self.teacher.head(cls_features(self.teacher.encoder, both))
            logits = self.center(output) / self.teacher_temp(step)
            target = logits.softmax(-1).unflatten(0, (-1, batch))
        # Each resolution goes through the encoder once, all its crops together.
        cls = [cls_features(encoder, crops) for crops in (both, *views.crops[2:])]
        student = self.head(torch.cat(cls)).unflatten(0, (-1, batch))
        loss = cross_entropy_of_views(target, student, self.config.student_temp)
        return {"loss": loss, **self._health(loss.detach(), target)}

    def _health(self, loss: Tensor, target: Float[Tensor, "g b k"]) -> dict[str, Tensor]:
        """Health scalars of the images at hand, which the loss alone does not show.

        The loss minus the teacher's entropy is KL(teacher || student), averaged over pairs, because
        each teacher view is in equally many of them.
        """
        entropy = torch.special.entr(target).sum(-1).mean()
        spread = torch.special.entr(target.mean((0, 1))).sum()
        return {
            "teacher_entropy": entropy,
            "teacher_entropy_share": entropy / math.log(max(2, self.config.prototypes)),
            "kl": loss - entropy,
            "prototypes_used": spread.exp(),
            "center_norm": self.center.value.norm(),
        }

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """The two ways in which self-distillation collapses (section 5.3 of the paper)."""
        share, used = means["teacher_entropy_share"], means["prototypes_used"]
        found, c = {}, self.config
        if share > _UNIFORM:
            found["uniform output"] = (
                f"the teacher's output is the same for every image: it is uniform "
                f"({share:.1%} of the largest entropy), so there is nothing to learn. Usual "
                f"remedies: a lower {flag(c, 'teacher_temp')}, a lower --optim.lr, a longer "
                "--optim.warmup"
            )
        if used < _ONE_PROTOTYPE and self.images >= _ENOUGH_IMAGES:
            found["one prototype"] = (
                f"the teacher's output is the same for every image: one prototype takes all "
                f"({used:.2f} of {c.prototypes} in use). Usual remedies: a lower "
                f"{flag(c, 'center_momentum')}, a higher {flag(c, 'teacher_temp')}, "
                f"{flag(c, 'norm_last_layer')} True, a lower --optim.lr"
            )
        return found

    def advice(self, setting: Setting) -> list[str]:
        """Advice for smaller batches and smaller devices than the original's."""
        c, lines = self.config, []
        small = setting.batch_size < _SMALL_BATCH and setting.images >= _MANY_IMAGES
        if small and c.momentum < _FAST_TEACHER:
            lines.append(
                f"{flag(c, 'momentum')} {c.momentum:g} is for batches of {_SMALL_BATCH}: in "
                f"batches of {setting.batch_size} the teacher averages over too few of "
                f"{setting.images:,} images; raise it, to 0.9995"
            )
        if setting.parts > 1:
            lines.append(
                f"--optim.accumulate {setting.parts} saves memory and nothing else: centre and "
                f"teacher move once a step, by the whole batch of {setting.batch_size}, and "
                "learning rate and momentum are those of that batch"
            )
        if setting.lacking and setting.per_crop:
            fitting = c.local_crops - math.ceil(setting.lacking / setting.per_crop)
            if fitting >= 0:
                lines.append(f"{flag(c, 'local_crops')} is {c.local_crops}; {fitting} should fit")
        return lines

    def before_update(self, step: int) -> None:
        """Leave the last layer as it is at first: it steadies the teacher's output."""
        if step < self.freeze_steps:
            for name, parameter in self.head.named_parameters():
                if "last_layer." in name:
                    parameter.grad = None

    def after_update(self, encoder: Encoder, step: int, took: Bool[Tensor, ""]) -> None:
        """Move teacher and centre."""
        self.teacher.follow(encoder, self.head, self.teacher_momentum(step), took)
        self.center.update(took)


def _crops(config: DINOConfig, large: tuple[int, int], small: tuple[int, int]) -> tuple[Crop, ...]:
    """The crops of an image; ``large``, ``small``: sizes of global and local ones in pixels."""

    levels = Levels(config.levels, config.channel_levels, config.drop_channels, config.noise)

    def crop(size: tuple[int, int], scale: tuple[float, float], kind: int, count: int) -> Crop:
        photometric = Photometric(
            jitter=config.jitter,
            gray=config.gray,
            blur=config.blur[kind],
            blur_sigma=config.blur_sigma,
            solarize=config.solarize if kind == 1 else 0.0,
        )
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

    crops = [crop(large, config.global_scale, kind, 1) for kind in (0, 1)]
    if config.local_crops:
        crops.append(crop(small, config.local_scale, 2, config.local_crops))
    return tuple(crops)


class DINO(Method):
    """The student predicts the teacher's output for other crops; the teacher is its average."""

    Config: ClassVar[type] = DINOConfig
    title, explained = TITLE, EXPLAINED
    pooling: ClassVar[str] = "cls"
    progress: ClassVar[tuple[str, ...]] = ("kl", "teacher_entropy_share", "prototypes_used")
    peak_in_warmup: ClassVar[bool] = True
    defaults: ClassVar[Defaults] = DEFAULTS

    def __init__(self, config: DINOConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        objective = DINOObjective(config, self.encoder)
        config.sizes(self.encoder.image_size, self.encoder.patch_size)
        truncated_init(self.encoder, objective.head)
        objective.add_teacher(self.encoder)
        self.add("dino", objective)

    @staticmethod
    def views(config: DINOConfig, encoder: Encoder) -> ViewSpec:
        """Two global crops, blurred and solarised differently, and the local ones."""
        image, patch = encoder.image_size, encoder.patch_size
        phases = tuple(
            Phase(end, large, ViewSpec(_crops(config, large, small)))
            for end, large, small in config.in_phases(image, patch)
        )
        return ViewSpec(_crops(config, *config.sizes(image, patch)), phases=phases)

    def exported_encoder(self) -> Encoder:
        """The teacher's: the better one at every moment of the training."""
        encoder: Encoder = self.objective.teacher.encoder
        return encoder

    def panels(self, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
        """Attention of the teacher's [CLS]."""
        return attention(self.exported_encoder(), views, normalize)


@torch.no_grad()
def attention(encoder: Encoder, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
    """Attention of an encoder's [CLS] in its last block, as a panel."""
    images = views.crops[0]
    maps, grid = cls_attention(encoder, images)
    return {"attention": attention_panel(to_rgb(normalize.inverse(images)), maps, grid)}
