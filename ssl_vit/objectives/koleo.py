"""KoLeo: features spread over the sphere (Sablayrolles et al. 2019; Oquab et al. 2023)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.distributed import gather_with_gradient
from ssl_vit.common.task import at_least_fp32

_EPS = 1e-8


def nearest_distances(features: Float[Tensor, "n d"], images: int = 0) -> Float[Tensor, " some"]:
    """Distance of each image to its nearest neighbour on the sphere, with gradients by both.

    Among groups of ``images`` images in a row; 0: all. Where a group is on several processes, rows
    are gathered, and all distances are found on each: for a mean, of which averaging the
    processes' gradients makes that of one process with all images. Alone, with one group, it
    equals::

        x = normalize(features)
        [min((x[i] - x[j]).norm() for j in range(n) if j != i) for i in range(n)]
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = at_least_fp32(features)
        if not images or len(rows) % images:
            rows = gather_with_gradient(rows)
        groups = F.normalize(rows, dim=1, eps=_EPS).split(images or len(rows))
        return torch.cat([_nearest(group) for group in groups])


def _nearest(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    with torch.no_grad():
        near = (rows @ rows.T).fill_diagonal_(-1).argmax(1)
    return (rows - rows[near]).norm(dim=1)


def koleo(distances: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Minus the mean logarithm of the distances: it falls as images move apart."""
    return -(distances + _EPS).log().mean()
