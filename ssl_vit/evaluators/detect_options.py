"""Options of object detection; none of it needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ssl_vit.common.checks import (
    check_below_one,
    check_given,
    check_least,
    check_portion,
    check_range,
    check_share,
    check_size,
)


@dataclass(frozen=True)
class DetectOptions:
    """Detector, and how its images are prepared."""

    prefix: ClassVar[str] = "detect"

    image_size: tuple[int, ...] = (1024,)
    """Height and width in pixels of the frame that images are put into, or one number for both:
    jittered in training, whole in evaluation. The patch size divides it."""
    frozen: bool = False
    """The encoder stays as it is; the pyramid and the heads are trained."""
    windows: int = 0
    """Window attention of a plain ViT: side of a window in patches, as 14 or 16. 0: all blocks are
    global."""
    global_blocks: int = 4
    """With windows: blocks that stay global, evenly spread, the last one among them. In training
    they are computed again in backward, to keep less."""
    masks: Literal["auto", "yes", "no"] = "auto"
    """Mask R-CNN, which finds masks too, or Faster R-CNN. auto: masks if all objects have one."""
    jitter: tuple[float, float] = (0.1, 2.0)
    """Large-scale jitter: least and most factor of the size that just fits into the frame."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    layer_decay: float = 0.7
    """Learning rate of a layer, as a share of that of the layer after it."""
    drop_path: float = 0.1
    """Stochastic depth of the last block of a plain ViT."""
    width: int = 256
    """Channels of the pyramid and of the heads' convolutions; their hidden layer has four times as
    many."""
    proposals: int = 512
    """Proposals of an image that classes are learned from."""
    detections: int = 100
    """Detections of an image at most, as COCO counts."""

    def __post_init__(self) -> None:
        check_given(self, "image_size")
        check_size(self, "image_size")
        check_least(self, 0, "windows", "global_blocks")
        check_least(self, 1, "width", "proposals", "detections")
        check_range(self, "jitter", most=10.0)
        check_share(self, "flip")
        check_portion(self, "layer_decay")
        check_below_one(self, "drop_path")

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of the frame."""
        return self.image_size[0], self.image_size[-1]
