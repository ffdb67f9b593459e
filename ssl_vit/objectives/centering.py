"""Centring: the running mean of a teacher's outputs, taken off them (Caron et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_vit.common.distributed import all_reduce_mean


class Center(nn.Module):
    """The centre ``c <- m c + (1 - m) mean(outputs)``, over the global batch of each step.

    It moves after the step that it was used in. Outputs may come in several calls; each counts by
    its rows, of which every process has as many.

    Args:
        outputs: K, the length of an output.
        momentum: m, the share of itself that it keeps at each step.
    """

    value: Tensor

    def __init__(self, outputs: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(outputs))
        self._seen: list[tuple[Tensor, int]] = []

    def forward(self, outputs: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The outputs less the centre; in training their mean is kept for :meth:`update`."""
        if self.training:
            self._seen.append((outputs.detach().mean(0), len(outputs)))
        return outputs - self.value

    @torch.no_grad()
    def update(self, took: Bool[Tensor, ""]) -> None:
        """Move by all outputs seen since the last update, of all parts of a step and processes;
        not at all unless ``took``."""
        if not self._seen:
            return
        means, rows = [mean for mean, _ in self._seen], [n for _, n in self._seen]
        self._seen.clear()
        if len(set(rows)) == 1:
            mean = torch.stack(means).mean(0)
        else:
            shares = [n / sum(rows) for n in rows]
            mean = torch.stack([m * share for m, share in zip(means, shares, strict=True)]).sum(0)
        mean = all_reduce_mean(mean)
        moved = self.value.lerp(mean, 1 - self.momentum)
        self.value.copy_(torch.where(took, moved, self.value))
