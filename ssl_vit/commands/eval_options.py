"""Options of evaluations: encoder, labelled images, and the options of each evaluator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssl_vit.common.checks import check_features, check_given, check_least, check_portion
from ssl_vit.common.errors import check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.evaluators.options import FEATURES, KS, SegmentOptions


@dataclass(frozen=True)
class EvalData(ReadConfig):
    """Labelled images for training and evaluation."""

    train: str = ""
    """Training images with labels, named as for pretraining: folder:PATH, tar:..., torchvision:...,
    hf:..."""
    val: str = ""
    """Validation images with labels, for the score only; no setting is chosen on them."""
    held_out: str = ""
    """Held-out images with labels, to choose settings. Empty: a seeded tenth of the training
    images."""
    workers: int = -1
    """Loader processes. -1: one for each core (on the CPU, for every second one), at most 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, -1, "workers")


@dataclass(frozen=True)
class EvalConfig:
    """Options of every evaluator."""

    config: str = ""
    """A YAML file of these options. The command line wins."""
    data: EvalData = field(default_factory=EvalData)
    encoder: str = ""
    """A run folder; a weight file: ours, official MAE or DINO (1 to 3), Hugging Face, timm;
    timm:NAME (timm's own weights) or timm:NAME:FILE. With the prefix random: the same architecture
    with random weights. With the prefix pixels: no encoder, but its input images, at most
    32 x 32."""
    size: tuple[int, ...] = ()
    """Height and width in pixels, or one number for both, that images are resized to; positions
    are resampled. Empty: the image size of the encoder."""
    out: str = ""
    """JSON file for the scores and their protocol. Empty: knn.json, linear.json (the fast
    protocol), linear-mae.json ... beside the encoder."""
    seed: int = 0
    """Seed of a random encoder, of the probe's weights, batches and held-out split, and of the
    bootstrap."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16, fp32 or auto, as in pretraining. Features are kept, and heads trained, in fp32."""
    batch_size: int = 256
    """Images per forward pass of the encoder."""

    def __post_init__(self) -> None:
        check_least(self, 1, "batch_size")


@dataclass(frozen=True)
class FeatureConfig(EvalConfig):
    """Options of evaluators of whole images."""

    features: tuple[str, ...] = ()
    """Features: cls, mean, cls+mean, cls4, cls4+mean (4: of the last four blocks, concatenated),
    pooled, pixels. Empty: the evaluator's default."""
    cache: bool = True
    """Cache features (in $SSL_VIT_CACHE or ~/.cache/ssl_vit), by the content of the weights and the
    images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_features(self.features, FEATURES)


@dataclass(frozen=True)
class KnnConfig(FeatureConfig):
    """k-NN evaluation weighted by cosine; leave-one-out without --data.val."""

    k: tuple[int, ...] = KS
    """Numbers of neighbours; those above the number of training images are skipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_given(self, "k")
        check_least(self, 1, "k")
        check(not self.data.held_out, "--data.held-out is not for knn, which chooses no setting")


@dataclass(frozen=True)
class LinearConfig(FeatureConfig):
    """Linear probe on frozen features, by a published protocol or the fast one."""

    protocol: Literal["fast", "dinov2", "mae", "dino", "logreg"] = "fast"
    """fast: DINOv2's grid of learning rates and features on cached features, in minutes. dinov2,
    mae, dino: as published, with augmented images, in hours. logreg: logistic regression on cached
    features. Settings are chosen without --data.val."""
    epochs: int = 0
    """Passes over the training images. 0: the protocol's own."""
    probe_batch: int = 0
    """Batch size (images) of the probe's optimizer steps. 0: the protocol's own."""
    per_class: tuple[int, ...] = ()
    """Low-shot: train on this many images of each class, for each number given. For fast and
    logreg."""
    fraction: tuple[float, ...] = ()
    """Low-shot: train on this share of the images, for each number given."""
    repeats: int = 5
    """Low-shot: mean over this many random choices of the images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "epochs", "probe_batch")
        check_least(self, 1, "repeats", "per_class")
        check_portion(self, "fraction")
        cached = self.protocol in ("fast", "logreg")
        few = bool(self.per_class or self.fraction)
        check(cached or not few, f"--protocol is {self.protocol!r}; low-shot is for fast, logreg")
        if self.protocol == "logreg":
            check(not self.epochs, "--epochs is not for logreg")
            check(not self.probe_batch, "--probe-batch is not for logreg")
        chooses = self.protocol not in ("mae", "dino") or len(self.features) > 1
        there = f"--data.held-out is not for --protocol {self.protocol} with one feature"
        check(chooses or not self.data.held_out, f"{there}: it chooses no setting")

    @property
    def amounts(self) -> list[tuple[int | None, float | None]]:
        """Low-shot amounts: (images per class, None) or (None, share of the images)."""
        return [(n, None) for n in self.per_class] + [(None, share) for share in self.fraction]


@dataclass(frozen=True)
class SegmentConfig(SegmentOptions, EvalConfig):
    """Segmentation probe: a linear head on patch tokens, for folders of images and masks.

    --data.train and --data.val are pairs:FOLDER (with images/ and masks/ in
    it) or pairs:IMAGES:MASKS, files of the same stems; a mask's pixel is the
    number of its class.
    """

    def __post_init__(self) -> None:
        SegmentOptions.__post_init__(self)
        EvalConfig.__post_init__(self)
        for option in ("held_out", "labels"):
            given = getattr(self.data, option)
            check(not given, f"--data.{option.replace('_', '-')} is not for segment")
