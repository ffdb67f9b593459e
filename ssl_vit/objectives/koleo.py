"""KoLeo: features spread over the sphere (Sablayrolles et al. 2019; Oquab et al. 2023)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.distributed import gather_with_gradient
from ssl_vit.common.task import at_least_fp32

_EPS = 1e-8


def nearest_distances(features: Float[Tensor, "n d"]) -> Float[Tensor, " all"]:
    """Distance of each image to its nearest neighbour among all images of all processes.

    Features are L2-normalised first. With gradients by rows and neighbours, for a loss that is the
    same on every process: what the processes' gradients average to is that of one process with all
    images. It equals, alone::

        x = normalize(features)
        [min((x[i] - x[j]).norm() for j in range(n) if j != i) for i in range(n)]
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = F.normalize(gather_with_gradient(at_least_fp32(features)), dim=1, eps=_EPS)
        with torch.no_grad():
            near = (rows @ rows.T).fill_diagonal_(-1).argmax(1)
        return (rows - rows[near]).norm(dim=1)


def koleo(distances: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Minus the mean logarithm of the distances: it falls as images move apart."""
    return -(distances + _EPS).log().mean()
