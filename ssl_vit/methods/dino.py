"""Self-distillation without labels, DINO (Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_vit.common.checks import (
    check_divides,
    check_least,
    check_length,
    check_not_negative,
    check_positive,
    check_range,
    check_share,
    check_size,
    flag,
    whole_patches,
)
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.common.figures import to_rgb
from ssl_vit.common.schedules import Length, warmup_cosine
from ssl_vit.common.task import Scalar, Views
from ssl_vit.data.augment import Crop, Normalize, Phase, ViewSpec
from ssl_vit.data.levels import Levels
from ssl_vit.data.photometric import Photometric
from ssl_vit.methods.base import Method, MethodConfig
from ssl_vit.model.attention import attention_panel, cls_attention, cls_features
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.init import truncated_init
from ssl_vit.objectives.base import Objective, Setting
from ssl_vit.objectives.centering import Center
from ssl_vit.objectives.cross_entropy import cross_entropy_of_views
from ssl_vit.objectives.ema import Teacher
from ssl_vit.objectives.heads import ProjectionHead

log = logging.getLogger("ssl_vit")
# Above this share of the largest entropy the teacher cannot distinguish images.
_UNIFORM = 0.99
# Fewer prototypes in use than this are one; not checked on fewer images, which may share one.
_ONE_PROTOTYPE, _ENOUGH_IMAGES = 1.5, 16
# Smaller batches of so many images want a teacher that moves less than this one, step by step.
_SMALL_BATCH, _MANY_IMAGES, _FAST_TEACHER = 512, 100_000, 0.998


@dataclass(frozen=True)
class DINOConfig(MethodConfig):
    """Self-distillation: a student learns the output of its own moving average, the teacher, for
    other crops of the same image."""

    prototypes: int = 65536
    """Outputs of the head (K in the paper). A few thousand do for a small set of images."""
    head_depth: int = 3
    """Linear layers of the head before the last one."""
    head_width: int = 2048
    """Features of the head's hidden layers."""
    bottleneck: int = 256
    """Features before the last layer, where they are L2-normalised."""
    norm_last_layer: bool = True
    """Fix the gain of the weight-normalised last layer at 1: steadier; the paper's best ViT-S
    frees it."""
    freeze_last_layer: str = "1ep"
    """The last layer does not move in this first part of the training, as 1ep or 500st."""
    momentum: float = 0.996
    """The teacher keeps this share of itself at each step; rises to 1 by half a cosine. For batches
    of 256 images and fewer on a big data set raise it, to 0.9995."""
    teacher_temp: float = 0.04
    """Temperature of the teacher's softmax; above 0.07 training is unstable."""
    teacher_temp_start: float = 0.04
    """Temperature at the start of its linear warm-up."""
    teacher_temp_warmup: str = "0ep"
    """Length of that warm-up: 30ep rises by epoch, as the original does, 500st by step."""
    student_temp: float = 0.1
    """Temperature of the student's softmax."""
    center_momentum: float = 0.9
    """The centre of the teacher's outputs keeps this share of itself at each step."""
    global_size: tuple[int, ...] = ()
    """Height and width of the two global crops in pixels. Empty: the encoder's image size."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a global crop covers, least and most."""
    local_crops: int = 8
    """Local crops of each image, seen by the student alone. 0: none."""
    local_size: tuple[int, ...] = ()
    """Height and width of a local crop in pixels. Empty: 3/7 of the global ones (96 of 224),
    rounded to whole patches."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a local crop covers, least and most."""
    phases: tuple[str, ...] = ()
    """Other sizes of the global crops at first, each with its end, as 112:75ep; local crops change
    in proportion. Small crops cost less, and the features are made in the last phase."""
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
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur for the first global crop, the second, and local ones."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, least and most: made for crops of 224 pixels."""
    solarize: float = 0.2
    """Probability of inverting the bright pixels of the second global crop."""
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
        check_least(self, 1, "prototypes", "head_depth", "head_width", "bottleneck")
        check_least(self, 0, "local_crops")
        check_share(self, "momentum", "center_momentum")
        check_share(self, "flip", "vertical_flip", "quarter_turns", "jitter", "gray", "solarize")
        check_share(self, "blur", "levels", "channel_levels", "drop_channels")
        check_not_negative(self, "noise")
        check_positive(self, "teacher_temp", "teacher_temp_start", "student_temp")
        check_range(self, "global_scale", "local_scale")
        check_range(self, "blur_sigma", most=math.inf)
        check_size(self, "global_size", "local_size")
        check_length(self, "freeze_last_layer", "teacher_temp_warmup")
        ends = [end for end, _ in self.parsed_phases()]
        rising = all(a.unit == b.unit and a.amount < b.amount for a, b in pairwise(ends))
        shown = " ".join(self.phases)
        check(rising, f"{flag(self, 'phases')} is {shown}; ends must rise, all in ep or all in st")

    def parsed_phases(self) -> list[tuple[Length, tuple[int, int]]]:
        """End and (height, width) of the global crops of each of ``phases``."""
        found = []
        for text in self.phases:
            match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?:(.+)", text)
            allowed = "allowed: a size and its end, as 112:75ep or 96x128:500st"
            check(match is not None, f"{flag(self, 'phases')} is {text!r}; {allowed}")
            assert match is not None
            height, end = int(match[1]), Length.parse(match[3], flag(self, "phases"))
            found.append((end, (height, int(match[2] or height))))
        return found

    def sizes(self, image: tuple[int, int], patch: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of global and of local crops for an encoder's image and patch size.

        Raises:
            UserError: a size that the patch does not divide.
        """
        large = _pair(self.global_size) or image
        small = _pair(self.local_size) or whole_patches(large[0] * 3 / 7, large[1] * 3 / 7, patch)
        used = {"global_size": [large], "phases": [size for _, size in self.parsed_phases()]}
        used |= {"local_size": [small]} if self.local_crops else {}
        for option, sizes in used.items():
            for size in sizes:
                check_divides(self, option, size, patch)
        return large, small

    def in_phases(
        self, image: tuple[int, int], patch: int
    ) -> list[tuple[Length, tuple[int, int], tuple[int, int]]]:
        """End of each of ``phases``, and the sizes of its global and local crops: these are to the
        global ones as they are afterwards, in whole patches."""
        (height, width), (h, w) = self.sizes(image, patch)
        return [
            (end, size, whole_patches(h * size[0] / height, w * size[1] / width, patch))
            for end, size in self.parsed_phases()
        ]


def _pair(size: tuple[int, ...]) -> tuple[int, int] | None:
    return (size[0], size[-1]) if size else None


class DINOObjective(Objective):
    """Cross-entropy between outputs of teacher and student for different crops of an image."""

    explained: ClassVar[dict[str, Scalar]] = {
        "loss": Scalar(
            "Loss",
            "Cross-entropy of teacher and student. It may rise while the features get better, as "
            "its target moves: look at k-NN.",
        ),
        "teacher_entropy_share": Scalar(
            "Teacher's entropy, share of the largest",
            "1: the teacher's output is the same for every image; 0: it is certain. It should "
            "settle between.",
        ),
        "teacher_entropy": Scalar(
            "Teacher's entropy", "In nats; its largest value is ln of the prototypes."
        ),
        "kl": Scalar(
            "KL(teacher || student)",
            "What the student has yet to learn: the loss without the teacher's entropy. 0 for long "
            "is a collapse.",
        ),
        "prototypes_used": Scalar(
            "Prototypes in use", "How many prototypes a batch is spread over. 1 is a collapse."
        ),
        "center_norm": Scalar("Norm of the centre", "It grows, then settles."),
    }

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
    title: ClassVar[str] = "DINO"
    explained: ClassVar[dict[str, Scalar]] = DINOObjective.explained
    pooling: ClassVar[str] = "cls"
    progress: ClassVar[tuple[str, ...]] = ("kl", "teacher_entropy_share", "prototypes_used")
    peak_in_warmup: ClassVar[bool] = True
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "encoder": {"drop_path": 0.1},
        "optim": {
            "base_lr": 5e-4,
            "min_lr": 1e-6,
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "clip": 3.0,
            "clip_by": "parameter",
        },
    }

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
