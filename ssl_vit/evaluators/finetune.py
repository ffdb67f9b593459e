"""Fine-tuning (He et al. 2022, appendix A.1): image classification as a task of the loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.checks import (
    check_below_one,
    check_not_negative,
    check_portion,
    check_range,
    check_share,
    check_size,
)
from ssl_vit.common.config import DataConfig, EncoderConfig, OptimConfig, RunConfig
from ssl_vit.common.errors import check
from ssl_vit.common.seeds import seeded
from ssl_vit.common.task import Task, Views, at_least_fp32
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.policy import Policy
from ssl_vit.evaluators.classifier import layer_scales, undecayed
from ssl_vit.objectives.ema import ema_update


@dataclass(frozen=True)
class TuneConfig:
    """Fine-tuning options; where the default depends on the encoder, the option says so."""

    group: ClassVar[str] = "tune"

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
    randaugment: str = "rand-m9-mstd0.5-inc1"
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
        if self.randaugment != "none":
            Policy(self.randaugment, ())

    @property
    def mixes(self) -> bool:
        """True if images of a batch are mixed in pairs (mixup or cutmix)."""
        return self.mixup > 0 or self.cutmix > 0

    def views(self, size: tuple[int, int], mean: tuple[float, ...]) -> ViewSpec:
        """Views: one crop of ``size`` (height, width); ``mean`` of the data set, by channel."""
        policy = None if self.randaugment == "none" else Policy(self.randaugment, mean)
        crop = Crop(
            size,
            scale=self.crop_scale,
            flip=self.flip,
            policy=policy,
            vertical_flip=self.vertical_flip,
            quarter_turns=self.quarter_turns,
        )
        return ViewSpec((crop,))


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune an encoder, or train one from scratch, to classify images."""

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

    def __post_init__(self) -> None:
        check(
            self.encoder in ("", "none") or self.scratch == EncoderConfig(),
            f"--scratch is for --encoder none; the architecture is that of {self.encoder!r}",
        )
        drop_path = self.scratch.drop_path
        check(drop_path == 0, f"--scratch.drop-path is {drop_path}; give it as --tune.drop-path")


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


class FineTune(Task):
    """Fine-tuning task: classification of augmented, mixed images.

    Augmentation on the device is timm's: erasing, then mixup or cutmix (one of the two for a batch,
    each with probability one half). It is seeded from the keys of the images in a process' part of
    a batch, so mixing depends on how a batch is split; only the noise that fills erased rectangles
    is torch's, seeded from the step and the process.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TuneConfig,
        classes: int,
        targets: Float[Tensor, "n l"] | None = None,
    ) -> None:
        """``classes``: outputs of the network. ``targets``: of several labels an image, the
        training images' outcomes, 1, 0, or NaN for unknown; a view's label is then its row."""
        super().__init__()
        self.network, self.config, self.targets = network, config, targets
        average = copy.deepcopy(network).requires_grad_(False) if config.ema else None
        self.average = average
        self._before: list[Tensor] | None = None
        self._scales = layer_scales(network, config.layer_decay)
        self._undecayed = undecayed(network)
        mixing = Mixup(
            config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes
        )
        self._mixing = mixing if config.mixes else None

    @property
    def evaluated(self) -> nn.Module:
        """Network that is evaluated and saved: the moving average, where there is one."""
        return self.network if self.average is None else self.average

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Cross-entropy in float32, against mixed labels; without mixing also accuracy (0..1). Of
        several labels an image, the mean binary cross-entropy."""
        images, labels, mixed = views.crops[0], views.labels, None
        if self.training and self._before is None:
            self._before = [buffer.clone() for buffer in self.network.buffers()]
        outcomes = self._outcomes(labels)
        with seeded(views.key):
            if self.config.erasing:
                images = erase(images, self.config.erasing)
            if self._mixing is not None and outcomes is not None:
                images, outcomes = mix_outcomes(self._mixing, images, outcomes)
            elif self._mixing is not None:
                images, mixed = self._mixing(images, labels)
        logits = at_least_fp32(self.network(images))
        if outcomes is not None:
            return {"loss": outcomes_loss(logits, outcomes, self.config.smoothing)}
        if mixed is not None:
            return {"loss": SoftTargetCrossEntropy()(logits, mixed)}
        loss = LabelSmoothingCrossEntropy(self.config.smoothing)(logits, labels)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    def _outcomes(self, rows: Int64[Tensor, " b"]) -> Float[Tensor, "b l"] | None:
        """Outcomes of several labels of the images at ``rows``; None for one class an image."""
        if self.targets is None:
            return None
        self.targets = self.targets.to(rows.device)  # copied once
        return self.targets[rows]

    def after_update(self, step: int, took: Bool[Tensor, ""]) -> None:
        """Update the moving average of the weights; buffers (BatchNorm statistics) are copied.

        The forward pass has already updated the buffers: after a skipped step they are restored.
        """
        for now, kept in zip(self.network.buffers(), self._before or (), strict=False):
            now.copy_(torch.where(took, now, kept))
        self._before = None
        if self.average is not None:
            ema_update(self.average, self.network, self.config.ema, took)
            buffers = zip(self.average.buffers(), self.network.buffers(), strict=True)
            for old, new in buffers:
                old.copy_(new)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Weight decay of all but vectors, positions, tokens, and timm's own exceptions."""
        inner = name.removeprefix("network.")
        return super().decays(name, parameter) and inner not in self._undecayed

    def lr_scale(self, name: str) -> float:
        """Layer-wise learning-rate decay (:func:`layer_scales`)."""
        return self._scales[name.removeprefix("network.")]


def mix_outcomes(
    mixing: Mixup, images: Float[Tensor, "b c h w"], outcomes: Float[Tensor, "b l"]
) -> tuple[Tensor, Float[Tensor, "b l"]]:
    """Mix images and the outcomes of their labels; an outcome is unknown (NaN) where one of an
    image's two is.

    timm mixes class numbers only: those of a class for each image are its shares in the mixture.
    """
    n = len(images)
    mixing.num_classes, mixing.label_smoothing = n, 0.0
    images, shares = mixing(images, torch.arange(n, device=images.device))
    shares = shares.to(outcomes.dtype)
    unknown = (shares > 0).to(outcomes.dtype) @ outcomes.isnan().to(outcomes.dtype) > 0
    mixed = shares @ outcomes.nan_to_num()
    return images, torch.where(unknown, torch.nan, mixed)


def outcomes_loss(
    logits: Float[Tensor, "b l"], outcomes: Float[Tensor, "b l"], smoothing: float
) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean over images and labels; unknown outcomes (NaN) count as 0.

    ``smoothing`` moves each outcome towards one half, as label smoothing does over two classes.
    """
    known = (~outcomes.isnan()).to(logits.dtype)
    truth = outcomes.nan_to_num() * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), known)


def erase(images: Tensor, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020) of normalised images (B, C, H, W), in place: with this
    probability, a rectangle of 2 to 33 % of an image is filled with normal noise."""
    erasing = RandomErasing(probability, mode="pixel", device=images.device)
    return erasing(images)
