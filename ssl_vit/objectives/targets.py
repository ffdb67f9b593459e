"""Targets of self-distillation: probabilities from a teacher's outputs, which must not collapse."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_vit.common.distributed import all_reduce_mean
from ssl_vit.common.task import product
from ssl_vit.objectives.centering import Center
from ssl_vit.objectives.row_blocks import row_blocks
from ssl_vit.objectives.sinkhorn import sinkhorn_knopp, unevenness
from ssl_vit.options.base import Kind

_ITERATIONS = 3


class Targets(nn.Module):
    """Targets from logits: a softmax of the centred ones, or Sinkhorn-Knopp over the whole batch.

    The batch is that of all processes; Sinkhorn-Knopp's is of the part of a step at hand.

    Args:
        outputs: K, prototypes.
        momentum: of the centre, which is there for centring only.
    """

    def __init__(self, outputs: int, kind: Kind, momentum: float) -> None:
        super().__init__()
        self.center = Center(outputs, momentum) if kind == "centering" else None

    @torch.no_grad()
    def forward(
        self,
        outputs: Float[Tensor, "n k"],
        temperature: float,
        valid: Float[Tensor, " n"] | None = None,
        moves_by: Float[Tensor, "m k"] | None = None,
    ) -> Float[Tensor, "n k"]:
        """Targets; ``valid``: 1 for rows that count, 0 for padding, whose targets are anything;
        ``moves_by``: outputs that move the centre in place of these; all count."""
        if self.center is not None:
            if moves_by is None:
                self.center.note(outputs, valid)
            else:
                self.center.note(moves_by)
            targets = torch.empty_like(outputs)
            for block in row_blocks(outputs):
                targets[block] = (self.center.apart(outputs[block]) / temperature).softmax(-1)
            return targets
        return sinkhorn_knopp(outputs / temperature, _ITERATIONS, valid)

    def update(self, took: Bool[Tensor, ""]) -> None:
        """Move the centre, unless the step was skipped."""
        if self.center is not None:
            self.center.update(took)

    @torch.no_grad()
    def health(
        self, targets: Float[Tensor, "n k"], weights: Float[Tensor, " n"] | None = None
    ) -> dict[str, Tensor]:
        """Scalars that show a collapse: mean entropy of targets, entropy of their mean, and what
        keeps them apart; ``weights``: of the rows in those means, 0 for those that do not count.

        What Sinkhorn-Knopp leaves is of the rows of all processes, as it is.
        """
        tiny = torch.finfo(targets.dtype).tiny
        weights = targets.new_ones(len(targets)) if weights is None else weights
        weights = weights / weights.sum().clamp(min=tiny)
        each = torch.empty_like(weights)
        for block in row_blocks(targets):
            each[block] = torch.special.entr(targets[block]).sum(-1)
        entropy = product(each, weights)
        share = product(weights, targets)
        found = {
            "teacher_entropy": entropy,
            "teacher_entropy_share": entropy / math.log(max(2, targets.shape[1])),
            "prototypes_used": torch.special.entr(share).sum().exp(),
        }
        if self.center is not None:
            return found | {"center_norm": self.center.value.norm()}
        counted = (weights > 0).to(targets.dtype)
        total = all_reduce_mean(product(counted, targets))
        return found | {"unevenness": unevenness(total / total.sum().clamp(min=tiny))}
