"""SIGReg: features pushed towards an isotropic Gaussian (Balestriero and LeCun 2025, arXiv
2511.08544)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssl_vit.common.distributed import mean_with_gradient, rank_and_world
from ssl_vit.common.seeds import fold, uniform

# Points at which characteristic functions are compared, on [0, _FAR]; they are even.
_POINTS, _FAR = 17, 3.0


def random_directions(
    step: int, width: int, count: int, device: torch.device
) -> Float[Tensor, "width count"]:
    """Unit vectors, uniform on the sphere: a function of the step, the same in every process."""
    keys = torch.full((1,), fold(step), device=device)  # filled there: not copied to it
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
    x = projections @ directions.to(projections.dtype)
    cosines, sines = mean_with_gradient(_Means.apply(x, t)).unbind()
    apart = (cosines - phi[:, None, None]).square() + sines.square()
    count = projections.shape[1] * rank_and_world()[1]
    return count * ((weights * phi)[:, None, None] * apart).sum(0).mean()


class _Means(torch.autograd.Function):
    """Means over a batch of cos(t x) and sin(t x), for equally spaced ``t`` from 0.

    From one to the next the angle grows by the same, so that cosine and sine of it are computed
    once and turned on, and nothing of the size of all points is kept: 17 times less memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "v n m"], t: Float[Tensor, " k"]
    ) -> Float[Tensor, "2 k v m"]:
        first = torch.stack([(x * t[1]).cos(), (x * t[1]).sin()])
        ctx.save_for_backward(first, t)
        means = x.new_empty(2, len(t), x.shape[0], x.shape[2])
        for i, turned in enumerate(_turning(first, len(t))):
            means[:, i] = turned.mean(2)
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "2 k v m"]) -> tuple[Tensor, None]:
        first, t = ctx.saved_tensors
        grad = grad[..., None, :] * (t / first.shape[2])[:, None, None, None]
        own = torch.zeros_like(first[0])
        for i, (cosine, sine) in enumerate(_turning(first, len(t))):
            own.addcmul_(grad[1, i], cosine).addcmul_(grad[0, i], sine, value=-1)
        return own, None


def _turning(first: Float[Tensor, "2 v n m"], count: int) -> Iterator[Float[Tensor, "2 v n m"]]:
    """Cosine and sine of 0, 1, 2 ... times an angle, of which those are given."""
    cosine, sine = torch.ones_like(first[0]), torch.zeros_like(first[0])
    for _ in range(count):
        turned = torch.stack([cosine, sine])
        yield turned
        cosine = turned[0] * first[0] - turned[1] * first[1]
        sine = turned[1] * first[0] + turned[0] * first[1]


def invariance(projections: Float[Tensor, "v n d"], anchors: int) -> Float[Tensor, ""]:
    """Mean squared difference of each view from the mean of the image's first ``anchors`` views."""
    return (projections - projections[:anchors].mean(0)).square().mean()
