"""Options of LeJEPA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssl_vit.common.checks import (
    check_below_one,
    check_divides,
    check_least,
    check_not_negative,
    check_range,
    check_share,
    check_size,
    flag,
    whole_patches,
)
from ssl_vit.common.errors import check
from ssl_vit.common.scalars import Scalar
from ssl_vit.options.base import Defaults, MethodConfig

TITLE = "LeJEPA"
EXPLAINED: dict[str, Scalar] = {
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
DEFAULTS: Defaults = {
    "optim": {"base_lr": 5e-4, "weight_decay": 0.05, "clip": 3.0},
}


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
        check_below_one(self, "sigreg_weight")
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
        """True if the projector has batch norms."""
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
