"""Sinkhorn-Knopp: a teacher's outputs as targets that use every prototype equally often
(Cuturi 2013; Caron et al. 2020, arXiv 2006.09882)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_vit.common.distributed import all_reduce_max, all_reduce_mean


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "n k"],
    iterations: int = 3,
    valid: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n k"]:
    """Targets (rows that sum to 1) from logits, already divided by their temperature.

    exp(logits), of which in turn every column, over the rows of all processes, and every row is
    scaled to the same sum. ``valid``: 1 for rows that count, 0 for padding, whose targets are 0.
    Factors common to all rows do not matter, so the largest logit is taken off first.
    """
    lowest = logits.new_full((1,), torch.finfo(logits.dtype).min)
    highest = torch.cat([logits.amax(1), lowest]).max()  # other processes may have rows, if not us
    mass = (logits - all_reduce_max(highest)).exp_()
    if valid is not None:
        mass *= valid[:, None]
    tiny = torch.finfo(mass.dtype).tiny
    for _ in range(iterations):
        mass /= all_reduce_mean(mass.sum(0)).clamp(min=tiny)
        mass /= mass.sum(1, keepdim=True).clamp(min=tiny)
    return mass


@torch.no_grad()
def unevenness(share: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Unevenness that Sinkhorn-Knopp has left: of the shares of prototypes in the targets (which
    sum to 1) how much would have to move for all to be equal. 0: nothing."""
    return (share - 1 / len(share)).clamp(min=0).sum()
