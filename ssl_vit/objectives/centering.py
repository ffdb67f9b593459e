"""Centring: the running mean of a teacher's outputs, taken off them (Caron et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_vit.common.distributed import all_reduce_mean


class Center(nn.Module):
    """The centre ``c <- m c + (1 - m) mean(outputs)``, over the global batch of each step.

    It moves after the step that it was used in.

    Args:
        outputs: K, the length of an output.
        momentum: m, the share of itself that it keeps at each step.
    """

    value: Tensor

    def __init__(self, outputs: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(outputs))
        self._seen: list[Tensor] = []

    def forward(self, outputs: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The outputs less the centre; in training their mean is kept for :meth:`update`."""
        if self.training:
            self._seen.append(outputs.detach().mean(0))
        return outputs - self.value

    @torch.no_grad()
    def update(self, took: Bool[Tensor, ""]) -> None:
        """Move by all outputs seen since the last update, of all parts of a step and processes;
        not at all unless ``took``."""
        mean = all_reduce_mean(torch.stack(self._seen).mean(0))
        self._seen.clear()
        moved = self.value.lerp(mean, 1 - self.momentum)
        self.value.copy_(torch.where(took, moved, self.value))
