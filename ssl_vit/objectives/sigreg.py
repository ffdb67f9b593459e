"""SIGReg: features pushed towards an isotropic Gaussian (Balestriero and LeCun 2025, arXiv
2511.08544)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.distributed import mean_with_gradient, rank_and_world
from ssl_vit.common.seeds import fold, uniform

# Points at which characteristic functions are compared, on [0, _FAR]; they are even.
_POINTS, _FAR = 17, 3.0


def random_directions(
    step: int, width: int, count: int, device: torch.device
) -> Float[Tensor, "width count"]:
    """Unit vectors, uniform on the sphere: a function of the step, the same in every process."""
    keys = torch.tensor([fold(step)], device=device)
    first, second = uniform(keys, 2 * width * count).view(2, width, count)
    # Box and Muller 1958; 1 - u lies in (0, 1].
    normal = (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()
    return F.normalize(normal, dim=0)


def sigreg(
    projections: Float[Tensor, "v n d"], directions: Float[Tensor, "d m"]
) -> Float[Tensor, ""]:
    """Epps-Pulley statistic of views of a batch, by directions: how far they are from a standard
    normal distribution, averaged over views and directions.

    The batch is that of all processes. For one view and one direction it equals, with the weights
    ``w`` of the trapezoidal rule times ``phi``::

        x = projections @ direction
        phi = exp(-(t**2) / 2)
        n * sum(w * ((cos(t * x).mean() - phi) ** 2 + sin(t * x).mean() ** 2))
    """
    t = torch.linspace(0, _FAR, _POINTS, device=projections.device, dtype=projections.dtype)
    phi = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * _FAR / (_POINTS - 1))
    weights[0] = weights[-1] = _FAR / (_POINTS - 1)
    angles = (projections @ directions.to(projections.dtype))[..., None] * t
    means = mean_with_gradient(torch.stack([angles.cos().mean(1), angles.sin().mean(1)]))
    apart = (means[0] - phi).square() + means[1].square()
    count = projections.shape[1] * rank_and_world()[1]
    return count * (apart @ (weights * phi)).mean()


def invariance(projections: Float[Tensor, "v n d"], anchors: int) -> Float[Tensor, ""]:
    """Mean squared difference of each view from the mean of the image's first ``anchors`` views."""
    return (projections - projections[:anchors].mean(0)).square().mean()
