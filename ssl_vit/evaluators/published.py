"""Published linear probe protocols: DINOv2, MAE and DINO, as options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ssl_vit.common.checks import check_least
from ssl_vit.common.distributed import rank_and_world
from ssl_vit.common.errors import check
from ssl_vit.common.schedules import warmup_cosine
from ssl_vit.common.seeds import fold
from ssl_vit.data.order import Order
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.model.encoder import Encoder


@dataclass(frozen=True)
class OnlineProtocol:
    """Online linear probe protocol: common options; each subclass has its paper's defaults.

    Random resized crops, bicubic, of ``scale`` of the area, and flips; a head of normal weights
    (sigma .01); no weight decay; half a cosine to learning rate 0. ``learning_rates`` are for 256
    images. An epoch has whole batches only; a batch is at most an eighth of the images.
    ``fallback`` is the (feature, rate) used where too few images remain to select on.
    """

    prefix: ClassVar[None] = None
    name: ClassVar[str]
    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    features: tuple[str, ...]
    warmup_epochs: int = 0
    by_epoch: bool = False
    """True if the rate changes with the epoch, not with the step."""
    trust: float = 0.0
    """LARS' trust coefficient; 0: SGD."""
    normed: bool = False
    """True if a BatchNorm without affine parameters comes before the linear layer."""
    momentum: float = 0.9
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    held_out: float = 0.0
    fallback: tuple[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, 1, "epochs", "batch_size")

    def order(self, n: int, at_once: int) -> Order:
        """Batch order over ``n`` images, in parts of at most ``at_once`` images per process."""
        rank, world = rank_and_world()
        # Batch statistics need two images.
        own = max(2, min(self.batch_size, n // 8)) // world or 1
        check(n >= own * world, f"the training set has {n} images; the probe needs {own * world}")
        parts = -(-own // at_once)
        size = own // parts * parts * world
        return Order(n, size, fold(self.seed, 2), parts, rank, world)

    def factor(self, step: int, order: Order) -> float:
        """Factor of ``learning_rates`` in a step."""
        per_epoch = order.steps_per_epoch
        total = self.epochs * per_epoch
        at = step // per_epoch * per_epoch if self.by_epoch else step
        warmup = min(self.warmup_epochs * per_epoch, total // 2)
        return warmup_cosine(at, warmup=warmup, total=total, peak=order.batch_size / 256)

    def fallback_of(self, grid: list[tuple[str, float]]) -> tuple[str, float]:
        """Fallback grid point where nothing can be selected; with the first feature if need be."""
        if self.fallback is None:
            return grid[0]
        feature, rate = self.fallback
        return (feature if feature in dict(grid) else grid[0][0]), rate


_DINOV2_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


@dataclass(frozen=True)
class Dinov2Protocol(OnlineProtocol):
    """DINOv2 linear probe (Oquab et al. 2023, appendix B.3): rates x features in one pass.

    The paper selects on the validation set that it reports; here a share of training is held out.
    """

    name = "dinov2"
    epochs: int = 10
    batch_size: int = 1024
    learning_rates: tuple[float, ...] = _DINOV2_RATES
    features: tuple[str, ...] = ("cls", "cls+mean", "cls4", "cls4+mean")
    held_out: float = 0.1
    fallback: tuple[str, float] | None = ("cls+mean", 0.005)


@dataclass(frozen=True)
class MaeProtocol(OnlineProtocol):
    """MAE linear probe (He et al. 2022, A.1): BatchNorm, LARS; 50 epochs from 24 blocks on."""

    name = "mae"
    epochs: int = 90
    batch_size: int = 16384
    learning_rates: tuple[float, ...] = (0.1,)
    features: tuple[str, ...] = ("cls",)
    warmup_epochs: int = 10
    trust: float = 0.001
    normed: bool = True


@dataclass(frozen=True)
class DinoProtocol(OnlineProtocol):
    """DINO linear probe (Caron et al. 2021, section 4.1): SGD; [CLS] of the last four blocks.

    Encoders of more than 384 features: [CLS] and the mean patch of the last. The original
    implementation interpolates crops bilinearly.
    """

    name = "dino"
    epochs: int = 100
    batch_size: int = 1024
    learning_rates: tuple[float, ...] = (0.001,)
    features: tuple[str, ...] = ("cls4",)
    by_epoch: bool = True


ONLINE: dict[str, Callable[..., OnlineProtocol]] = {
    kind.name: kind for kind in (Dinov2Protocol, MaeProtocol, DinoProtocol)
}
"""Published protocols by name."""


def online_protocol(
    name: str,
    backbone: Backbone,
    seed: int,
    epochs: int = 0,
    batch_size: int = 0,
    features: tuple[str, ...] = (),
) -> OnlineProtocol:
    """Published protocol for an encoder; 0 and empty keep its own values."""
    protocol = ONLINE[name](seed=seed)
    own: dict[str, Any] = {}
    if isinstance(backbone.module, Encoder):
        vit = backbone.module.vit
        if name == "mae" and len(vit.blocks) >= 24:
            own["epochs"] = 50
        if name == "dino" and vit.embed_dim > 384:
            own["features"] = ("cls+mean",)
    if len(features) > 1:  # one is selected, on held-out images
        own["held_out"] = protocol.held_out or 0.1
    given = {"epochs": epochs, "batch_size": batch_size, "features": features}
    return replace(protocol, **(own | {option: value for option, value in given.items() if value}))
