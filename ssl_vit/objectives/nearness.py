"""Nearness: a term that keeps features near those of the weights that training began with."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.task import at_least_fp32
from ssl_vit.model.encoder import Encoder


class Nearness:
    """One minus the cosine between an encoder's features and those it had at first.

    The first encoder follows from the options, as the weights that they name: it is no part of the
    state, and no module, so that it is neither saved, nor trained, nor sharded.
    """

    def __init__(self, encoder: Encoder, weight: float) -> None:
        config = replace(encoder.config, drop_path=0.0)
        self.weight, self.first = weight, Encoder(config, encoder.channels)
        self.first.augmented = False
        self.first.load_state_dict(encoder.state_dict(), strict=True)
        self.first.requires_grad_(False).eval()

    def distance(self, encoder: Encoder, images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """Mean over images, of [CLS] where there is one, and of the mean patch."""
        with torch.no_grad():
            before = self.first.to(images.device)(images)
        now = encoder(images)
        kinds = ["mean"] if now.cls is None else ["cls", "mean"]
        pairs = [[at_least_fp32(f.pool(kind)) for f in (now, before)] for kind in kinds]
        return 1 - torch.stack([F.cosine_similarity(a, b, dim=1).mean() for a, b in pairs]).mean()

    def __deepcopy__(self, memo: dict[int, Any]) -> Nearness:
        """A copy shares the encoder, which never changes."""
        return copy.copy(self)
