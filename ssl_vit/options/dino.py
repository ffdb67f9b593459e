"""Options of DINO."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

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
from ssl_vit.common.errors import check
from ssl_vit.common.scalars import Scalar
from ssl_vit.common.schedules import Length
from ssl_vit.options.base import Defaults, MethodConfig

TITLE = "DINO"
EXPLAINED: dict[str, Scalar] = {
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
DEFAULTS: Defaults = {
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
