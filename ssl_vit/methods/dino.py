"""Self-distillation without labels, DINO (Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_vit.common.config import EncoderConfig, Length, check
from ssl_vit.common.distributed import all_reduce_mean
from ssl_vit.common.figures import to_rgb
from ssl_vit.common.schedules import warmup_cosine
from ssl_vit.common.task import Views
from ssl_vit.data.augment import Crop, Normalize, ViewSpec
from ssl_vit.data.photometric import Photometric
from ssl_vit.methods.base import Method, Setting
from ssl_vit.model.attention import attention_panel, cls_attention, cls_features
from ssl_vit.model.encoder import Encoder
from ssl_vit.objectives.ema import ema_update
from ssl_vit.objectives.heads import ProjectionHead

log = logging.getLogger("ssl_vit")
# Above this share of the largest entropy the teacher tells no image from another.
_UNIFORM = 0.99
# Fewer prototypes in use than this are one; said of no fewer images, which may share one rightly.
_ONE_PROTOTYPE, _ENOUGH_IMAGES = 1.5, 16
# Smaller batches of so many images want a teacher that moves less than this one, step by step.
_SMALL_BATCH, _MANY_IMAGES, _FAST_TEACHER = 512, 100_000, 0.998


@dataclass(frozen=True)
class DINOConfig:
    """Self-distillation: a student learns what its own moving average, the teacher, says of other
    crops of the same image."""

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
    flip: float = 0.5
    """Probability of a horizontal flip."""
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

    def __post_init__(self) -> None:
        for option in ("prototypes", "head_depth", "head_width", "bottleneck"):
            value = getattr(self, option)
            check(value >= 1, f"{_flag(option)} is {value}; at least 1")
        for option in ("momentum", "center_momentum"):
            value = getattr(self, option)
            check(0 <= value <= 1, f"{_flag(option)} is {value}; it lies in [0, 1]")
        for option in ("teacher_temp", "teacher_temp_start", "student_temp"):
            value = getattr(self, option)
            check(0 < value < math.inf, f"{_flag(option)} is {value}; it must be above 0")
        for option in ("global_scale", "local_scale"):
            low, high = getattr(self, option)
            check(0 < low <= high <= 1, f"{_flag(option)} is {low} {high}; 0 < least <= most <= 1")
        for option in ("global_size", "local_size"):
            value = getattr(self, option)
            check(len(value) <= 2, f"{_flag(option)} is {value}; one number or two")
        for option in ("flip", "jitter", "gray", "solarize", "blur"):
            value = getattr(self, option)
            shares = value if isinstance(value, tuple) else (value,)
            check(all(0 <= p <= 1 for p in shares), f"{_flag(option)} is {value}; 0 to 1 allowed")
        low, high = self.blur_sigma
        check(0 < low <= high < math.inf, f"--method.blur-sigma is {low} {high}; 0 < least <= most")
        check(self.local_crops >= 0, f"--method.local-crops is {self.local_crops}; 0 or more")
        for option in ("freeze_last_layer", "teacher_temp_warmup"):
            Length.parse(getattr(self, option), _flag(option))

    def sizes(self, image: tuple[int, int], patch: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of global and of local crops for an encoder's image and patch size.

        Raises:
            UserError: a size that the patch does not divide.
        """
        large = _pair(self.global_size) or image
        share = 3 / 7 / patch
        small = _pair(self.local_size) or (
            patch * max(1, round(large[0] * share)),
            patch * max(1, round(large[1] * share)),
        )
        used = {"global_size": large} | ({"local_size": small} if self.local_crops else {})
        for option, size in used.items():
            fits = all(s > 0 and s % patch == 0 for s in size)
            shown = "x".join(map(str, size))
            check(fits, f"{_flag(option)} is {shown}; the patch size, {patch}, must divide it")
        return large, small


def _flag(option: str) -> str:
    return f"--method.{option.replace('_', '-')}"


def _pair(size: tuple[int, ...]) -> tuple[int, int] | None:
    return (size[0], size[-1]) if size else None


class DINO(Method):
    """The student predicts the teacher's output for other crops; the teacher is its average."""

    Config: ClassVar[type] = DINOConfig
    pooling: ClassVar[str] = "cls"
    spoken: ClassVar[tuple[str, ...]] = ("kl", "teacher_entropy_share", "prototypes_used")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "encoder": {"drop_path": 0.1},
        "optim": {
            "base_lr": 5e-4,
            "min_lr": 1e-6,
            "peak_in_warmup": True,
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "clip": 3.0,
            "clip_by": "parameter",
        },
    }
    center: Tensor

    def __init__(self, config: DINOConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        self.config: DINOConfig = config
        check(
            self.encoder.vit.cls_token is not None,
            f"--encoder.arch is {encoder_config.arch!r}; DINO learns by [CLS], which it lacks",
        )
        config.sizes(self.encoder.image_size, self.encoder.patch_size)
        self.head = self._new_head()
        self._init_weights()
        # Stochastic depth is the student's alone.
        self.teacher = Encoder(replace(encoder_config, drop_path=0.0), channels)
        self.teacher_head = self._new_head()
        self.teacher.load_state_dict(self.encoder.state_dict(), strict=True)
        self.teacher_head.load_state_dict(self.head.state_dict(), strict=True)
        self.teacher.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        self.register_buffer("center", torch.zeros(config.prototypes))
        self.outputs: list[Tensor] = []
        self.images = 0
        self.set_length(1, 1)

    def _new_head(self) -> ProjectionHead:
        c = self.config
        widths = [self.encoder.width, *[c.head_width] * (c.head_depth - 1), c.bottleneck]
        return ProjectionHead(widths, c.prototypes, fixed_gain=c.norm_last_layer)

    def _init_weights(self) -> None:
        """The original's: linear maps and tokens truncated normal with σ = .02, zero biases."""
        for module in [*self.encoder.modules(), *self.head.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        vit = self.encoder.vit
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        if vit.pos_embed.requires_grad:
            nn.init.trunc_normal_(vit.pos_embed, std=0.02)

    @staticmethod
    def views(config: DINOConfig, encoder: Encoder) -> ViewSpec:
        """Two global crops, blurred and solarised differently, and the local ones."""
        large, small = config.sizes(encoder.image_size, encoder.patch_size)

        def crop(size: tuple[int, int], scale: tuple[float, float], kind: int, count: int) -> Crop:
            photometric = Photometric(
                jitter=config.jitter,
                gray=config.gray,
                blur=config.blur[kind],
                blur_sigma=config.blur_sigma,
                solarize=config.solarize if kind == 1 else 0.0,
            )
            return Crop(size, scale, flip=config.flip, count=count, photometric=photometric)

        crops = [crop(large, config.global_scale, kind, 1) for kind in (0, 1)]
        if config.local_crops:
            crops.append(crop(small, config.local_scale, 2, config.local_crops))
        return ViewSpec(tuple(crops))

    def begin_with(self, state: dict[str, Tensor], where: str) -> None:
        """Student and teacher start equal."""
        super().begin_with(state, where)
        self.teacher.load_state_dict(self.encoder.state_dict(), strict=True)

    def exported_encoder(self) -> Encoder:
        """The teacher's: the better one at every moment of the training."""
        return self.teacher

    def set_length(self, steps: int, steps_per_epoch: int) -> None:
        """Resolve what depends on the length of the training."""
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        c = self.config
        freeze = Length.parse(c.freeze_last_layer, "--method.freeze-last-layer")
        self.freeze_steps = freeze.steps(steps_per_epoch)
        if 1 < steps <= self.freeze_steps:
            log.warning(
                "--method.freeze-last-layer is %s, the whole training: the prototypes never move",
                c.freeze_last_layer,
            )
        self.temp_warmup = Length.parse(c.teacher_temp_warmup, "--method.teacher-temp-warmup")

    def teacher_temp(self, step: int) -> float:
        """Temperature at a step, counted from 0: linear, by epoch or by step, then constant."""
        c, span = self.config, self.temp_warmup
        n = math.ceil(span.amount)
        i = step // self.steps_per_epoch if span.unit == "ep" else step
        if i >= n:
            return c.teacher_temp
        return c.teacher_temp_start + (c.teacher_temp - c.teacher_temp_start) * i / max(1, n - 1)

    def teacher_momentum(self, step: int) -> float:
        """The share of itself that the teacher keeps at a step, from 0: half a cosine up to 1."""
        return warmup_cosine(step, warmup=0, total=self.steps, peak=self.config.momentum, end=1.0)

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """The loss of a batch and, of the same outputs, what shows a collapse."""
        self.images = batch = len(views.keys)
        both = torch.cat(views.crops[:2])
        with torch.no_grad():
            output = self.teacher_head(cls_features(self.teacher, both))
            if self.training:
                self.outputs.append(output.mean(0))
            logits = (output - self.center) / self.teacher_temp(step)
            target = logits.softmax(-1).unflatten(0, (-1, batch))
        # Each resolution goes through the encoder once, all its crops together.
        cls = [cls_features(self.encoder, crops) for crops in (both, *views.crops[2:])]
        student = self.head(torch.cat(cls)).unflatten(0, (-1, batch))
        loss = cross_entropy_of_views(target, student, self.config.student_temp)
        return {"loss": loss, **self._health(loss.detach(), target)}

    def _health(self, loss: Tensor, target: Float[Tensor, "g b k"]) -> dict[str, Tensor]:
        """What the loss alone does not show, of the images at hand.

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
            "center_norm": self.center.norm(),
        }

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """The two ways in which self-distillation collapses (section 5.3 of the paper)."""
        share, used = means["teacher_entropy_share"], means["prototypes_used"]
        found = {}
        if share > _UNIFORM:
            found["uniform output"] = (
                f"the teacher says the same of every image: its output is uniform "
                f"({share:.1%} of the largest entropy), so there is nothing to learn. Usual "
                "remedies: a lower --method.teacher-temp, a lower --optim.lr, a longer "
                "--optim.warmup"
            )
        if used < _ONE_PROTOTYPE and self.images >= _ENOUGH_IMAGES:
            found["one prototype"] = (
                f"the teacher says the same of every image: one prototype takes all ({used:.2f} "
                f"of {self.config.prototypes} in use). Usual remedies: a lower "
                "--method.center-momentum, a higher --method.teacher-temp, "
                "--method.norm-last-layer True, a lower --optim.lr"
            )
        return found

    def advice(self, setting: Setting) -> list[str]:
        """What the original's batches of 512 and its GPUs let one forget."""
        c, lines = self.config, []
        small = setting.batch_size < _SMALL_BATCH and setting.images >= _MANY_IMAGES
        if small and c.momentum < _FAST_TEACHER:
            lines.append(
                f"--method.momentum {c.momentum:g} is for batches of {_SMALL_BATCH}: in batches of "
                f"{setting.batch_size} the teacher averages over too few of {setting.images:,} "
                "images; raise it, to 0.9995"
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
                lines.append(f"--method.local-crops is {c.local_crops}; {fitting} should fit")
        return lines

    def before_update(self, step: int) -> None:
        """Leave the last layer as it is at first: it steadies what the teacher says."""
        if step < self.freeze_steps:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_update(self, step: int, finite: Bool[Tensor, ""]) -> None:
        """Move teacher and centre."""
        momentum = self.teacher_momentum(step)
        ema_update(self.teacher, self.encoder, momentum, finite)
        ema_update(self.teacher_head, self.head, momentum, finite)
        # Over the parts of a step and over processes: the mean of the whole batch.
        mean = all_reduce_mean(torch.stack(self.outputs).mean(0))
        self.outputs.clear()
        moved = self.center.lerp(mean, 1 - self.config.center_momentum)
        self.center.copy_(torch.where(finite, moved, self.center))

    @torch.no_grad()
    def panels(self, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
        """Where the teacher's [CLS] looks in its last block."""
        images = views.crops[0]
        attention, grid = cls_attention(self.teacher, images)
        return {"attention": attention_panel(to_rgb(normalize.inverse(images)), attention, grid)}


def cross_entropy_of_views(
    target: Float[Tensor, "g b k"], student: Float[Tensor, "v b k"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Cross-entropy of every pair of different views; the student's first g are the teacher's.

    ``target`` holds probabilities, which get no gradient; ``student`` logits, before they are
    divided by their temperature. It equals::

        logits = student / temperature
        pairs = [(t, s) for t in range(g) for s in range(v) if s != t]
        mean(-(target[t] * logits[s].log_softmax(-1)).sum(-1).mean() for t, s in pairs)

    but visits each view once, and finds its gradient at the same time.
    """
    with torch.autocast(student.device.type, enabled=False):  # it would round a product
        loss: Tensor = _CrossEntropy.apply(target, student, temperature)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """A view s is compared with w_s, the sum of all targets but its own, of total mass m_s: the
    loss is the sum of -w_s log p_s over all, and its gradient by the logits m_s p_s - w_s."""

    @staticmethod
    def forward(
        ctx: Any,
        target: Float[Tensor, "g b k"],
        student: Float[Tensor, "v b k"],
        temperature: float,
    ) -> Float[Tensor, ""]:
        g, v, batch = len(target), len(student), target.shape[1]
        share = 1 / (batch * (g * v - g))
        together = target.sum(0)
        log_p = (student * (1 / temperature)).log_softmax(-1)
        own = (target * log_p[:g]).sum()
        loss = (own - (log_p.flatten(1) @ together.flatten()).sum()) * share
        mass = log_p.new_full((v, 1, 1), g)
        mass[:g] -= 1
        grad = log_p.exp_().mul_(mass * (share / temperature))
        grad.sub_(together, alpha=share / temperature)
        grad[:g].add_(target, alpha=share / temperature)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, ""]) -> tuple[None, Tensor, None]:
        return None, ctx.saved_tensors[0] * grad, None
