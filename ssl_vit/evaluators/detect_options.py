"""Options of object detection; none of it needs torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
    flag,
)
from ssl_vit.common.errors import check

DETR_HEADS = 8
"""Attention heads of DETR's decoder."""
_TRANSFORMERS = (5, 1)  # the first whose decoder layers have these names and this signature


def check_transformers() -> None:
    """Check that transformers is installed, in a version that has DETR's layers as they are used.

    Raises:
        UserError: it is not.
    """
    least = ".".join(map(str, _TRANSFORMERS))
    text = f"--detect.head detr needs transformers {least} or later: pip install 'ssl_vit[detr]'"
    check(importlib.util.find_spec("transformers") is not None, text)
    version = importlib.metadata.version("transformers")
    found = tuple(int(part) for part in version.split(".")[:2])
    check(found >= _TRANSFORMERS, f"{text} (there is {version})")


@dataclass(frozen=True)
class DetectOptions:
    """Detector, and how its images are prepared."""

    prefix: ClassVar[str] = "detect"

    image_size: tuple[int, ...] = (1024,)
    """Height and width in pixels of the frame that images are put into, or one number for both:
    jittered in training, whole in evaluation. The patch size divides it."""
    head: Literal["rcnn", "detr"] = "rcnn"
    """rcnn: Faster or Mask R-CNN on a feature pyramid. detr: DETR's decoder on the patch tokens
    (Carion et al. 2020), boxes only; it needs many epochs."""
    queries: int = 100
    """DETR's queries: more than an image has objects."""
    frozen: bool = False
    """The encoder stays as it is; what is above it is trained."""
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
    many. Of DETR: width of the decoder, whose hidden layers have eight times as many."""
    proposals: int = 512
    """Proposals of an image that classes are learned from."""
    detections: int = 100
    """Detections of an image at most, as COCO counts."""

    def __post_init__(self) -> None:
        check_given(self, "image_size")
        check_size(self, "image_size")
        check_least(self, 0, "windows", "global_blocks")
        check_least(self, 1, "queries", "width", "proposals", "detections")
        check_range(self, "jitter", most=10.0)
        check_share(self, "flip")
        check_portion(self, "layer_decay")
        check_below_one(self, "drop_path")
        self._check_head()

    def _check_head(self) -> None:
        """Check that what is asked for is an option of the head."""
        detr, of = self.head == "detr", f"--detect.head {self.head}"
        idle = "proposals" if detr else "queries"
        given, default = getattr(self, idle), getattr(DetectOptions, idle)
        check(given == default, f"{flag(self, idle)} is {given}; it has no effect on {of}")
        if detr:
            rule = f"{of} finds boxes only: give auto, or --detect.head rcnn"
            check(self.masks != "yes", f"--detect.masks is 'yes'; {rule}")
            rule = f"{of} divides it among {DETR_HEADS} attention heads: give a multiple"
            check(self.width % DETR_HEADS == 0, f"--detect.width is {self.width}; {rule}")

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of the frame."""
        return self.image_size[0], self.image_size[-1]
