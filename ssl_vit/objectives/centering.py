"""Centring: the running mean of a teacher's outputs, taken off them (Caron et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_vit.common.distributed import all_reduce_mean
from ssl_vit.common.task import product


class Center(nn.Module):
    """The centre ``c <- m c + (1 - m) mean(outputs)``, over the global batch of each step.

    It moves after the step that it was used in. Outputs may come in several calls and processes;
    each row counts as much as another.

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

    def forward(
        self, outputs: Float[Tensor, "n k"], valid: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n k"]:
        """The outputs less the centre, of which :meth:`note` is taken."""
        self.note(outputs, valid)
        return self.apart(outputs)

    def apart(self, outputs: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The outputs less the centre."""
        return outputs - self.value

    def note(self, outputs: Float[Tensor, "n k"], valid: Float[Tensor, " n"] | None = None) -> None:
        """Keep the sum of the outputs, in training, for :meth:`update`; ``valid``: 1 for rows that
        count, 0 for padding."""
        if self.training:
            rows = outputs.detach()
            total = rows.sum(0) if valid is None else product(valid, rows)
            count = rows.new_full((), len(rows)) if valid is None else valid.sum()
            self._seen.append(torch.cat([total, count[None]]))

    @torch.no_grad()
    def update(self, took: Bool[Tensor, ""]) -> None:
        """Move by all outputs seen since the last update, of all parts of a step and processes;
        not at all unless ``took``, or where there were none."""
        if not self._seen:
            return
        found = all_reduce_mean(torch.stack(self._seen).sum(0))
        self._seen.clear()
        total, count = found[:-1], found[-1]
        moved = self.value.lerp(total / count, 1 - self.momentum)
        self.value.copy_(torch.where(took & (count > 0), moved, self.value))
