"""Options of SimMIM."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssl_vit.common.checks import check_inside, check_least, check_range, check_share, flag
from ssl_vit.common.errors import check
from ssl_vit.common.scalars import Scalar
from ssl_vit.options.base import Defaults, MethodConfig

TITLE = "SimMIM"
EXPLAINED: dict[str, Scalar] = {
    "loss": Scalar("Loss", "Mean absolute error of the masked pixels. It falls steadily.", True)
}
DEFAULTS: Defaults = {
    "encoder": {"drop_path": 0.1},
    "optim": {"base_lr": 5e-5, "weight_decay": 0.05, "clip": 5.0},
}


@dataclass(frozen=True)
class SimMIMConfig(MethodConfig):
    """Masked image modelling: mask tokens in place of patches, one linear layer to their pixels."""

    mask_ratio: float = 0.6
    """Share of the image that is masked, in units at random."""
    mask_unit: int = 2
    """Side of a unit in patches; it divides the grid of patches (2: 32 px of patches of 16)."""
    crop_scale: tuple[float, float] = (0.67, 1.0)
    """Share of the image's area that a random crop covers, least and most."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip: for images without an up, as of microscopes."""
    quarter_turns: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, each as likely; no pixel is interpolated."""

    def __post_init__(self) -> None:
        check_inside(self, "mask_ratio")
        check_least(self, 1, "mask_unit")
        check_range(self, "crop_scale")
        check_share(self, "flip", "vertical_flip", "quarter_turns")

    def check_grid(self, grid: tuple[int, int], asked: float = 0.0) -> None:
        """Refuse a grid of patches that units do not divide, or of which nothing stays visible;
        ``asked``: with another ratio, of ``--mask-ratio``."""
        unit, shown = self.mask_unit, "x".join(map(str, grid))
        fits = all(side % unit == 0 for side in grid)
        check(
            fits,
            f"{flag(self, 'mask_unit')} is {unit}; it must divide the grid of {shown} patches",
        )
        ratio, units = asked or self.mask_ratio, grid[0] * grid[1] // unit**2
        other = "" if asked else f", or {flag(self, 'mask_unit')}"
        check(
            math.ceil(units * ratio) < units,
            f"{'--mask-ratio' if asked else flag(self, 'mask_ratio')} is {ratio}; of {units} units "
            f"of {unit}x{unit} patches it leaves none visible: lower it{other}",
        )
