"""Options of MAE."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_vit.common.checks import (
    check_heads,
    check_inside,
    check_least,
    check_range,
    check_share,
    flag,
)
from ssl_vit.common.errors import check
from ssl_vit.common.scalars import Scalar
from ssl_vit.options.base import Defaults, MethodConfig

TITLE = "MAE"
EXPLAINED: dict[str, Scalar] = {
    "loss": Scalar("Loss", "Mean squared error of the masked patches. It falls steadily.", True)
}
DEFAULTS: Defaults = {
    "encoder": {"positions": "sincos"},
    "optim": {"betas": (0.9, 0.95), "base_lr": 1.5e-4, "weight_decay": 0.05},
}


@dataclass(frozen=True)
class MAEConfig(MethodConfig):
    """Masked autoencoder: hide most patches of an image, predict their pixels."""

    mask_ratio: float = 0.75
    """Share of the patches that is hidden, per image at random."""
    normalize_target: bool = True
    """Predict each patch normalised by its own mean and variance, rather than raw pixels."""
    decoder_width: int = 512
    """Features of a decoder token."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of each decoder block."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers, least and most."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip: for images without an up, as of microscopes."""
    quarter_turns: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, each as likely; no pixel is interpolated."""

    def __post_init__(self) -> None:
        check_inside(self, "mask_ratio")
        check_least(self, 1, "decoder_width", "decoder_depth", "decoder_heads")
        check_heads(self, "decoder_heads", "decoder_width", self.decoder_heads)
        check_range(self, "crop_scale")
        check_share(self, "flip", "vertical_flip", "quarter_turns")

    def visible(self, n: int, asked: float = 0.0) -> int:
        """Number of visible patches of ``n``; ``asked``: with another ratio, of ``--mask-ratio``.

        Raises:
            UserError: none would be visible, or none masked.
        """
        ratio = asked or self.mask_ratio
        visible = int(n * (1 - ratio))
        check(
            1 <= visible < n,
            f"{'--mask-ratio' if asked else flag(self, 'mask_ratio')} is {ratio}; of {n} patches "
            f"it leaves {visible} visible, and at least 1 must be visible and 1 masked",
        )
        return visible
