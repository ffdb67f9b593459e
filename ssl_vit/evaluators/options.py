"""Options of evaluators, and the names they are chosen by; none of it needs torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from ssl_vit.common.checks import (
    check_below_one,
    check_given,
    check_least,
    check_not_negative,
    check_portion,
    check_positive,
    check_range,
    check_share,
    check_size,
    flag,
)
from ssl_vit.common.config import EncoderConfig, OptimConfig, RunConfig
from ssl_vit.common.errors import check
from ssl_vit.common.reading import DataConfig, beside
from ssl_vit.evaluators.depth_options import DepthHeadOptions

# Numbers of neighbours.
KS = (10, 20, 100, 200)
# Files of features by their suffix, each with a library that it needs; empty: none.
FEATURE_FILES = {".npz": "", ".parquet": "pyarrow", ".npy": ""}
# RandAugment of fine-tuning, which is not checked by timm, as that imports torch.
_RANDAUGMENT = "rand-m9-mstd0.5-inc1"

# A feature is a concatenation of parts. ``cls-2`` is [CLS] after the last block but one.
_LAST_FOUR = ("cls-4", "cls-3", "cls-2", "cls")
FEATURES = {
    "cls": ("cls",),
    "mean": ("mean",),
    "cls+mean": ("cls", "mean"),
    "cls4": _LAST_FOUR,
    "cls4+mean": (*_LAST_FOUR, "mean"),
    "pooled": ("pooled",),
    "pixels": ("pixels",),
}
PATCHES = "patches"
"""Part (N, D) of an image, and no feature of evaluators, which take one vector an image."""
Head = Literal["linear", "mlp", "transformer"]
"""Heads of segmentation, from feature maps to classes of pixels."""


def parts_of(features: tuple[str, ...]) -> tuple[str, ...]:
    """Parts that these features (keys of ``FEATURES``) consist of, each once."""
    return tuple(dict.fromkeys(part for name in features for part in FEATURES[name]))


def check_format(out: str) -> None:
    """Check that ``--out`` names a file of a known format whose library is installed.

    Raises:
        UserError: it does not.
    """
    suffix = Path(out).suffix
    allowed = ", ".join(FEATURE_FILES)
    check(suffix in FEATURE_FILES, f"--out is {out!r}; its name must end in {allowed}")
    needs = FEATURE_FILES[suffix]
    there = not needs or importlib.util.find_spec(needs) is not None
    check(there, f"--out is {out!r}, which needs {needs}: pip install 'ssl_vit[parquet]'")


@dataclass(frozen=True)
class SegmentHeadOptions:
    """Options of a segmentation head and its score, frozen or fine-tuned."""

    head: Head = "linear"
    """linear; mlp: one hidden layer of 512; transformer: Segmenter's mask transformer, of two
    blocks (Strudel et al. 2021)."""
    blocks: Literal[1, 4] = 1
    """Patch tokens of the last block, or of each of the last four, joined. Of a network with
    stages (Swin, ConvNeXt, ResNet): its last stage, or all four at the size of the finest."""
    ignore: int = 255
    """Number in the masks of pixels that have no class. -1: there is none."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes at which images are scored, as factors of the encoder's. Above 1 the image is cut into
    windows of that size. Probabilities are averaged over windows and scales. Training is at 1."""
    overlap: float = 0.5
    """Share of a window that at least overlaps the next one."""
    flip: bool = False
    """Score mirror images, too, and average."""

    def __post_init__(self) -> None:
        check_given(self, "scales")
        check_positive(self, "scales")
        check_below_one(self, "overlap")
        rule = "a class number, or -1 for none"
        check(self.ignore >= -1, f"{flag(self, 'ignore')} is {self.ignore}; {rule}")


@dataclass(frozen=True)
class SegmentOptions(SegmentHeadOptions):
    """Options of the segmentation probe."""

    epochs: int = 30
    """Passes over the training images, 16 of them a step (fewer where there are under 128)."""
    cache_gb: float = 8.0
    """Tokens of the training images are kept in memory up to this size, in units of 1e9 bytes.
    If they need more, they are recomputed in every epoch: same score, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "epochs")
        check_not_negative(self, "cache_gb")


@dataclass(frozen=True)
class TuneConfig:
    """Fine-tuning options; where the default depends on the encoder, the option says so."""

    prefix: ClassVar[str] = "tune"

    pooling: Literal["mean", "cls"] = "mean"
    """Feature to classify: the mean of the patch tokens, or [CLS]. From scratch: cls. Networks that
    are no plain ViT pool as they are used to."""
    image_size: tuple[int, ...] = ()
    """Height and width in pixels, or one number; positions are resampled. Empty: the encoder's."""
    channels: str = "mean"
    """Filters of --data.channels other than the encoder's, as --init.channels of pretrain."""
    drop_path: float = 0.1
    """Stochastic depth of the last block. Above 12 blocks: 0.2, above 24: 0.3."""
    layer_decay: float = 0.65
    """Learning rate of a layer, as a share of that of the layer after it. Above 12 blocks: 0.75.
    From scratch: 1, all alike."""
    mixup: float = 0.8
    """Alpha of mixup; 0: none. With cutmix, each batch has one of the two by chance."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0: none."""
    smoothing: float = 0.1
    """Label smoothing."""
    randaugment: str = _RANDAUGMENT
    """RandAugment in timm's notation, for 8-bit images of 1 or 3 channels. none: without."""
    erasing: float = 0.25
    """Probability that a rectangle of an image is replaced by noise."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and most share of an image's area in a random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip; a --data.preset sets flips and turns, and nothing else."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip: for images without an up, as of microscopes."""
    quarter_turns: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, each as likely; no pixel is interpolated."""
    ema: float = 0.0
    """Decay of a moving average of the weights, as 0.9999: that is evaluated and saved. 0: none."""

    def __post_init__(self) -> None:
        check_below_one(self, "drop_path", "smoothing", "ema")
        check_share(self, "erasing", "flip", "vertical_flip", "quarter_turns")
        check_not_negative(self, "mixup", "cutmix")
        check_portion(self, "layer_decay")
        check_range(self, "crop_scale")
        check_size(self, "image_size")
        if self.randaugment not in ("none", _RANDAUGMENT):
            from ssl_vit.data.policy import Policy

            Policy(self.randaugment, ())

    @property
    def mixes(self) -> bool:
        """True if images of a batch are mixed in pairs (mixup or cutmix)."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class SegmentTuneConfig(SegmentHeadOptions):
    """Segmentation, for images named as pairs:ROOT."""

    prefix: ClassVar[str] = "segment"


@dataclass(frozen=True)
class DepthTuneConfig(DepthHeadOptions):
    """Depth, for images named as depth:ROOT."""

    prefix: ClassVar[str] = "depth"


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune an encoder, or train one from scratch, to classify images; or pixels, of images
    with masks (pairs:ROOT), or their depths (depth:ROOT)."""

    config: str = ""
    """A YAML file of these options, or a recipe by its name in configs/. The command line wins."""
    encoder: str = ""
    """A run folder, a weight file, or timm:NAME. none: from scratch, the architecture of --scratch;
    random:ENCODER: from scratch, that encoder's architecture."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            batch_size=1024, base_lr=5e-4, min_lr=1e-6, warmup="5ep"
        )
    )
    scratch: EncoderConfig = field(default_factory=EncoderConfig)
    segment: SegmentTuneConfig = field(default_factory=SegmentTuneConfig)
    depth: DepthTuneConfig = field(default_factory=DepthTuneConfig)

    @property
    def dense(self) -> str:
        """Target of each pixel, ``pairs`` or ``depth``, as the images are named; empty: there is
        none, but the classes of images."""
        kind = beside(self.data.train)
        return kind if kind in ("pairs", "depth") else ""

    def __post_init__(self) -> None:
        check(
            self.encoder in ("", "none") or self.scratch == EncoderConfig(),
            f"--scratch is for --encoder none; the architecture is that of {self.encoder!r}",
        )
        drop_path = self.scratch.drop_path
        check(drop_path == 0, f"--scratch.drop-path is {drop_path}; give it as --tune.drop-path")


def dense_recipe(depth: int | None, channels: int = 3) -> FinetuneConfig:
    """Options for places in an image, before YAML and command line: crops and flips alone, a small
    batch, the layer decay of ``recipe``.

    As BEiT's segmentation (Bao et al. 2022, appendix), but for the length; its rate is for 16
    images of a step.
    """
    tune = recipe(True, depth).tune
    return FinetuneConfig(
        run=RunConfig(length="50ep"),
        data=DataConfig(channels=channels),
        tune=replace(
            tune,
            mixup=0.0,
            cutmix=0.0,
            smoothing=0.0,
            randaugment="none",
            erasing=0.0,
            crop_scale=(0.25, 1.0),
        ),
        optim=OptimConfig(batch_size=16, base_lr=1.6e-3, warmup="5ep"),
    )


def recipe(pretrained: bool, depth: int | None, channels: int = 3) -> FinetuneConfig:
    """Published options for a network, before YAML and command line.

    Pretrained: He et al. 2022, appendix A.1, table 9, by the number of blocks (12: B, 24: L, 32: H;
    None, a network that is no plain ViT: as 12). From scratch: Touvron et al. 2021, table 9.
    ``channels``: of the images it takes.
    """
    data = DataConfig(channels=channels)
    if not pretrained:
        return FinetuneConfig(
            run=RunConfig(length="300ep"),
            data=data,
            tune=TuneConfig(pooling="cls", layer_decay=1.0),
            optim=OptimConfig(batch_size=1024, base_lr=2.5e-4, min_lr=1e-5, warmup="5ep"),
        )
    if depth is None or depth <= 12:
        return FinetuneConfig(data=data)
    return FinetuneConfig(
        run=RunConfig(length="50ep"),
        data=data,
        tune=TuneConfig(layer_decay=0.75, drop_path=0.2 if depth <= 24 else 0.3),
        optim=OptimConfig(batch_size=1024, base_lr=1e-3, min_lr=1e-6, warmup="5ep"),
    )
