"""Options of MAE and DINO together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from ssl_vit.common.checks import flag
from ssl_vit.common.errors import check
from ssl_vit.common.scalars import Scalar
from ssl_vit.options import dino, mae
from ssl_vit.options.base import MethodConfig
from ssl_vit.options.dino import DINOConfig
from ssl_vit.options.mae import MAEConfig

TITLE = "MAE + DINO"
EXPLAINED: dict[str, Scalar] = {
    "loss": Scalar("Loss", "Weighted sum of the two below."),
    **{f"mae_{k}": s._replace(title=f"MAE: {s.title}") for k, s in mae.EXPLAINED.items()},
    **{f"dino_{k}": s._replace(title=f"DINO: {s.title}") for k, s in dino.EXPLAINED.items()},
}
DEFAULTS = dino.DEFAULTS


@dataclass(frozen=True)
class MAEPart(MAEConfig):
    """Options of the masked autoencoder."""

    prefix: ClassVar[str] = "method.mae"


@dataclass(frozen=True)
class DINOPart(DINOConfig):
    """Options of the self-distillation."""

    prefix: ClassVar[str] = "method.dino"


@dataclass(frozen=True)
class MAEDINOConfig(MethodConfig):
    """Masked autoencoder and self-distillation on one encoder; the loss is their weighted sum."""

    mae_weight: float = 1.0
    """Weight of the masked autoencoder's loss."""
    dino_weight: float = 1.0
    """Weight of the self-distillation's loss."""
    mae: MAEPart = field(default_factory=MAEPart)
    dino: DINOPart = field(default_factory=DINOPart)

    def __post_init__(self) -> None:
        for option, other in (("mae_weight", "dino"), ("dino_weight", "mae")):
            value = getattr(self, option)
            check(
                0 < value < math.inf,
                f"{flag(self, option)} is {value:g}; it must be above 0 (pretrain {other} is "
                "without it)",
            )
