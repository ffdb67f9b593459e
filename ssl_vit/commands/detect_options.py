"""Options of object detection: what is trained on which images, and how."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from ssl_vit.commands.cli import find_recipe, layered, split_config
from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.errors import check
from ssl_vit.common.reading import DataConfig
from ssl_vit.evaluators.detect_options import DetectOptions, check_transformers

PROG = "python -m ssl_vit.evaluate detect"


@dataclass(frozen=True)
class DetectConfig:
    """Train a detector (Faster or Mask R-CNN, or DETR) on an encoder, and score it by COCO's
    metrics.

    --data.train and --data.val are coco:ROOT (with images/ and annotations.json
    in it) or coco:IMAGES:ANNOTATIONS.json.
    """

    config: str = ""
    """A YAML file of these options, or a recipe by its name in configs/. The command line wins."""
    encoder: str = ""
    """A run folder, a weight file, or timm:NAME (also Swin, ConvNeXt, ResNet).
    random:ENCODER: from scratch, that encoder's architecture."""
    run: RunConfig = field(default_factory=lambda: RunConfig(probe_images=500))
    data: DataConfig = field(default_factory=lambda: DataConfig(train=""))
    detect: DetectOptions = field(default_factory=DetectOptions)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            batch_size=64, lr=1e-4, weight_decay=0.1, warmup="250st"
        )
    )

    def __post_init__(self) -> None:
        for option, why in (
            ("cache", "images are decoded anew"),
            ("shard_window", "coco has no shards"),
        ):
            given = getattr(self.data, option)
            name = f"--data.{option.replace('_', '-')}"
            check(not given, f"{name} is {given!r}; it has no effect on detect: {why}")
        check(
            self.run.parallel == "ddp",
            f"--run.parallel is {self.run.parallel!r}; detectors are not sharded: give ddp",
        )


def read_options(argv: list[str], channels: int = DataConfig.channels) -> DetectConfig:
    """Options: defaults < YAML < command line. ``channels``: default of --data.channels.

    Raises:
        UserError: a mistake in them, or a library is missing.
    """
    configs, flags = split_config(argv)
    files = [find_recipe(c) for c in configs]
    default = DetectConfig(data=DataConfig(train="", channels=channels))
    config = layered(default, files, flags, PROG, DetectConfig.__doc__ or "", DetectConfig)
    check(
        importlib.util.find_spec("pycocotools") is not None,
        "detect needs pycocotools: pip install 'ssl_vit[detect]' (or pycocotools)",
    )
    if config.detect.head == "detr":
        check_transformers()
    check(bool(config.data.train), "--data.train is missing: coco:ROOT or coco:IMAGES:FILE.json")
    check(config.encoder != "none", "--encoder is 'none'; from scratch give random:ENCODER")
    return config
