"""Options of I-JEPA."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_vit.common.checks import check_least, check_range, check_share, flag
from ssl_vit.common.errors import check
from ssl_vit.common.scalars import Scalar
from ssl_vit.options.base import Defaults, MethodConfig

TITLE = "I-JEPA"
EXPLAINED: dict[str, Scalar] = {
    "loss": Scalar(
        "Loss",
        "Smooth L1 of predicted features. It may rise while the features get better, as its "
        "target moves: look at k-NN.",
    ),
    "target_spread": Scalar(
        "Spread of targets",
        "Standard deviation of the targets over a batch's images, at the same place; near 0 is "
        "a collapse, 1 the most.",
    ),
}
DEFAULTS: Defaults = {
    "encoder": {"positions": "sincos"},
    "optim": {
        "base_lr": 1.25e-4,
        "min_lr": 1e-6,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
    },
}


@dataclass(frozen=True)
class IJEPAConfig(MethodConfig):
    """Features of blocks of an image are predicted from its context block."""

    targets: int = 4
    """Target blocks of an image, each predicted on its own."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    """Share of the image that a target block covers, least and most."""
    target_aspect: tuple[float, float] = (0.75, 1.5)
    """Height of a target block over its width in patches, least and most."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Share of the image that the context block covers, before target blocks are taken out."""
    predictor_width: int = 384
    """Features of a token of the predictor, which is narrower than the encoder."""
    predictor_depth: int = 12
    """Blocks of the predictor."""
    predictor_heads: int = 0
    """Attention heads of each of its blocks. 0: as many as the encoder's."""
    momentum: float = 0.996
    """The teacher keeps this share of itself at each step; rises to 1, linearly."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that a random crop covers, least and most."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip: for images without an up, as of microscopes."""
    quarter_turns: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, each as likely; no pixel is interpolated."""

    def __post_init__(self) -> None:
        check_least(self, 1, "targets", "predictor_width", "predictor_depth")
        check_least(self, 0, "predictor_heads")
        check_range(self, "target_scale", "context_scale", "crop_scale")
        check_range(self, "target_aspect", most=float("inf"))
        check_share(self, "momentum", "flip", "vertical_flip", "quarter_turns")
        check(
            self.predictor_width % 4 == 0,
            f"{flag(self, 'predictor_width')} is {self.predictor_width}; sine-cosine positions "
            "need a number that 4 divides",
        )
