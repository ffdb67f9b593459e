"""Options of the benchmark of detection's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ssl_vit.commands.benchmark_options import check_out
from ssl_vit.common.checks import check_given, check_least
from ssl_vit.common.config import EncoderConfig, RunConfig
from ssl_vit.common.errors import check
from ssl_vit.common.layers import COMMAND_LINE, parse
from ssl_vit.evaluators.detect_options import DetectOptions

_PROG = "python -m ssl_vit.benchmark detection"


@dataclass(frozen=True)
class DetectionConfig:
    """Detection benchmark: images per second and memory of a training step of evaluate detect, with
    global attention and with windows, beside torchvision's Mask R-CNN on ResNet-50, on noise with
    made-up boxes and masks. All have random weights. Used are --encoder, --detect (but image-size,
    masks, jitter and flip) and, of --run, seed, device, precision, compile and
    activation-checkpointing."""

    sizes: tuple[int, ...] = (512, 1024)
    """Heights and widths of images in pixels, each measured alone; the patch size divides them."""
    objects: int = 10
    """Objects in each image, with masks."""
    batch_size: int = 1
    """Images of one step."""
    repeats: int = 3
    """Timed steps."""
    warm_up: int = 1
    """Untimed steps before them."""
    out: str = ""
    """JSON file for the report. Empty: none."""
    run: RunConfig = field(default_factory=RunConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    detect: DetectOptions = field(default_factory=lambda: DetectOptions(windows=16))

    def __post_init__(self) -> None:
        check_given(self, "sizes")
        check_least(self, 1, "objects", "batch_size", "repeats")
        check_least(self, 0, "warm_up")
        check_least(self, 32, "sizes")  # the stride of the coarsest level
        check_least(self.detect, 1, "windows")
        head = self.detect.head
        check(head == "rcnn", f"--detect.head is {head!r}; beside torchvision's is rcnn alone")
        check_out(self.out)

    def framed(self, size: int, windows: int) -> DetectOptions:
        """Options of a detector for images of this size, with these windows (0: none)."""
        return replace(self.detect, image_size=(size,), windows=windows)


def parse_options(argv: Sequence[str]) -> DetectionConfig:
    """Options of the command.

    Raises:
        UserError: an option that is unknown or not allowed.
    """
    return parse(DetectionConfig(), list(argv), COMMAND_LINE, _PROG, DetectionConfig.__doc__ or "")
