"""Options of the attentive probe; none of it needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssl_vit.commands.eval_options import EvalConfig
from ssl_vit.common.checks import check_least, check_not_negative


@dataclass(frozen=True)
class AttentiveConfig(EvalConfig):
    """Attentive probe: cross-attention on frozen patch tokens, then a linear layer; the same choice
    on held-out images as linear."""

    heads: int = 0
    """Attention heads; they must divide the encoder's width. 0: as many as are 64 wide, or one."""
    depth: int = 1
    """Layers. 1: cross-attention alone. Above: so many less one of self-attention and MLP on the
    tokens before it, much slower."""
    queries: Literal["one", "class"] = "one"
    """One learnt query for the image, or one for each class, whose answer gives that class's
    logit."""
    epochs: int = 0
    """Passes over the training images. 0: 10, or more for 1,000 updates."""
    probe_batch: int = 0
    """Batch size (images) of the probe's updates. 0: 256, an eighth of small sets."""
    cache_gb: float = 8.0
    """Tokens of the training images are kept in memory up to this size, in units of 1e9 bytes.
    If they need more, they are recomputed in every epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "heads", "epochs", "probe_batch")
        check_least(self, 1, "depth")
        check_not_negative(self, "cache_gb")
