"""Options of the depth probe; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssl_vit.common.checks import check_least, check_not_negative, check_positive, flag
from ssl_vit.common.errors import check


@dataclass(frozen=True)
class DepthHeadOptions:
    """Options of a depth head, its depths and its score, frozen or fine-tuned."""

    head: Literal["linear", "linear4", "dpt"] = "linear"
    """linear: 256 bins of depth from each patch token of the last block. linear4: of four blocks
    spread over the depth. dpt: a small DPT head on these four. Of Swin, ConvNeXt, ResNet: the last
    stage, or four."""
    scale: float = 1.0
    """Depth of the value 1 in a file, as 0.001 for millimetres, or 0.00390625 (1/256) for KITTI.
    All depths, also those of these options and the RMSE, are then in that unit."""
    min_depth: float = 0.001
    """Least depth of a valid pixel."""
    max_depth: float = 0.0
    """Greatest depth of a valid pixel; those beyond are neither trained on nor scored. 0: the
    greatest of the training maps."""
    crop: Literal["none", "eigen", "garg", "nyu"] = "none"
    """Part of a validation map that is scored: all; Eigen's or Garg's crop for KITTI; Eigen's for
    NYU Depth v2 (maps of 480 x 640)."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "min_depth")
        check_not_negative(self, "max_depth")
        most, least = flag(self, "max_depth"), flag(self, "min_depth")
        check(
            not self.max_depth or self.max_depth > self.min_depth,
            f"{most} is {self.max_depth:g}; it must be above {least}, {self.min_depth:g}",
        )


@dataclass(frozen=True)
class DepthOptions(DepthHeadOptions):
    """Options of the depth probe."""

    epochs: int = 30
    """Passes over the training images, 16 of them a step (fewer where there are under 128)."""
    cache_gb: float = 8.0
    """Feature maps of the training images are kept in memory up to this size, in units of 1e9
    bytes. If they need more, they are recomputed in every epoch: same score, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "cache_gb")
        check_least(self, 1, "epochs")
