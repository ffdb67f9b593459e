"""Options of pretraining's optimizer: how the encoder, and each of its layers, is moved."""

from dataclasses import dataclass
from typing import Any

from ssl_vit.common.checks import check_length, check_portion, check_positive
from ssl_vit.common.config import OptimConfig

# Defaults where training begins with given weights: new heads would ruin them at the whole rate.
SPARING: dict[str, Any] = {
    "freeze_encoder": "10%",
    "release": "10%",
    "encoder_lr": 0.1,
    "layer_decay": 0.9,
    "patch_lr": 0.2,
}
SPARING_ADAPTERS = {name: SPARING[name] for name in ("freeze_encoder", "release")}


@dataclass(frozen=True)
class PretrainOptim(OptimConfig):
    """Optimizer and its schedules, and how an encoder with given weights is spared."""

    freeze_encoder: str = "0st"
    """First part of the training, in which the encoder does not move, so that new heads learn to
    read it: as 500st, 1ep, or 10% of the run. With --init.encoder: 10%."""
    release: str = "0st"
    """Next part, in which the encoder's rate rises linearly from 0 to its own. With --init.encoder:
    10%."""
    encoder_lr: float = 1.0
    """Factor of the encoder's learning rate; heads have the whole one. With --init.encoder: 0.1."""
    layer_decay: float = 1.0
    """Factor of the learning rate from one block of the encoder to the one before it. With
    --init.encoder: 0.9."""
    patch_lr: float = 1.0
    """Further factor of the learning rate of the patch embedding. With --init.encoder: 0.2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self, "freeze_encoder", "release", share=True)
        check_positive(self, "encoder_lr")
        check_portion(self, "layer_decay", "patch_lr")

    def scale_of(self, encoder: bool, above: int, patches: bool) -> float:
        """Layer decay: less by a factor for each block above; the encoder and its patch embedding
        have further ones."""
        rate: float = self.layer_decay**above
        rate *= self.patch_lr if patches else 1.0
        return rate * (self.encoder_lr if encoder else 1.0)

    def held_back(self) -> tuple[str, str]:
        """Freezing and release of the encoder, as the options have them."""
        return self.freeze_encoder, self.release
