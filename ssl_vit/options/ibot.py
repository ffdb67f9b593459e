"""Options of iBOT."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_vit.common.checks import check_positive, flag
from ssl_vit.common.errors import check
from ssl_vit.options.dino import DEFAULTS as DEFAULTS
from ssl_vit.options.dinov2 import EXPLAINED as EXPLAINED
from ssl_vit.options.dinov2 import DINOv2Config

TITLE = "iBOT"


@dataclass(frozen=True)
class IBOTConfig(DINOv2Config):
    """Self-distillation of [CLS], as DINO's, and of masked patches. Defaults are those of the
    published ViT-S/16."""

    prototypes: int = 8192
    momentum: float = 0.996
    teacher_temp_warmup: str = "30ep"
    """Length of that warm-up: 30ep rises by epoch, as the original does, 500st by step."""
    patch_temp: float = 0.07
    """Temperature of the teacher's softmax for patches."""
    patch_temp_start: float = 0.04
    """Temperature at the start of its linear warm-up, which is as long."""
    patch_prototypes: int = 0
    """Outputs of the patches' own last layer, on the rest of [CLS]'s head. 0: they share its."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_crops: int = 10
    local_scale: tuple[float, float] = (0.05, 0.25)
    koleo_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "patch_temp", "patch_temp_start")
        check(
            not self.patch_bottleneck,
            f"{flag(self, 'patch_bottleneck')} is {self.patch_bottleneck}; patches share the head "
            "but for its last layer",
        )
