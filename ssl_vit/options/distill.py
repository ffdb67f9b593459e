"""Options of distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssl_vit.common.checks import (
    check_not_negative,
    check_range,
    check_share,
    check_size,
    flag,
)
from ssl_vit.common.errors import check
from ssl_vit.common.scalars import Scalar
from ssl_vit.options.base import Defaults, MethodConfig

TITLE = "Distillation"
EXPLAINED: dict[str, Scalar] = {
    "loss": Scalar("Loss", "Weighted sum of the losses of images and patches.", True),
    "cls_loss": Scalar("Loss of images", "Of [CLS], or the mean patch.", True),
    "patch_loss": Scalar("Loss of patches", "Mean over the patches.", True),
    "cls_cosine": Scalar(
        "Cosine with the teacher", "Of [CLS]; 1 is the teacher's direction.", False
    ),
}
DEFAULTS: Defaults = {
    "optim": {"base_lr": 5e-4, "weight_decay": 0.05, "clip": 3.0},
}
Loss = Literal["smooth_l1", "mse", "cosine"]


@dataclass(frozen=True)
class DistillConfig(MethodConfig):
    """A student of any size learns the features of a frozen teacher through linear heads."""

    teacher: str = ""
    """The encoder to learn from: a run folder or weight file, as for --init.encoder. Of another
    size, patch and number of channels if need be."""
    teacher_size: tuple[int, ...] = ()
    """Height and width in pixels at which the teacher sees a crop. Empty: the student's image size,
    in whole patches of the teacher."""
    loss: Loss = "smooth_l1"
    """Between a head's output and the teacher's feature: the mean over features of smooth L1 or of
    the squared error, with the teacher's layer-normalised; or 1 - cosine."""
    cls_weight: float = 1.0
    """Weight of the image's feature: [CLS], or the mean patch of an encoder without it."""
    patch_weight: float = 1.0
    """Weight of the patches' features; the teacher's grid is resized to the student's."""
    crop_scale: tuple[float, float] = (0.25, 1.0)
    """Share of the image's area that a random crop covers, least and most."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip: for images without an up, as of microscopes."""
    quarter_turns: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, each as likely; no pixel is interpolated."""
    jitter: float = 0.8
    """Probability of colour jitter (brightness .4, contrast .4, saturation .2, hue .1)."""
    levels: float = 0.0
    """Probability of another contrast (.4) and brightness (.5 deviations) about the data set's
    mean, for any kind of number: where 0 is not black, in place of jitter."""
    channel_levels: float = 0.0
    """Probability that each channel has a contrast and brightness of its own."""

    def __post_init__(self) -> None:
        check_size(self, "teacher_size")
        check_not_negative(self, "cls_weight", "patch_weight")
        check_range(self, "crop_scale")
        check_share(self, "flip", "vertical_flip", "quarter_turns")
        check_share(self, "jitter", "levels", "channel_levels")
        check(
            self.cls_weight + self.patch_weight > 0,
            f"{flag(self, 'cls_weight')} and {flag(self, 'patch_weight')} are 0; nothing is left "
            "to learn",
        )

    @property
    def where(self) -> str:
        """The teacher, in messages."""
        return f"{flag(self, 'teacher')} {self.teacher}"
