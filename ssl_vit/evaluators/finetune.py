"""Fine-tuning (He et al. 2022, appendix A.1): image classification as a task of the loop."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float, Int64
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.seeds import seeded
from ssl_vit.common.task import Task, Views, at_least_fp32
from ssl_vit.data.augment import ViewSpec, one_crop
from ssl_vit.data.policy import Policy
from ssl_vit.evaluators.classifier import layer_scales, undecayed
from ssl_vit.evaluators.options import TuneConfig
from ssl_vit.objectives.ema import ema_update


def tuning_views(config: TuneConfig, size: tuple[int, int], mean: tuple[float, ...]) -> ViewSpec:
    """Views: one crop of ``size`` (height, width); ``mean`` of the data set, by channel."""
    policy = None if config.randaugment == "none" else Policy(config.randaugment, mean)
    return one_crop(size, config, policy)


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
