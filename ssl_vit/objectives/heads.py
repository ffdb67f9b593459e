"""Projection heads: of self-distillation, with prototypes on a unit sphere; others with norms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssl_vit.common.distributed import mean_with_gradient, rank_and_world
from ssl_vit.common.task import at_least_fp32
from ssl_vit.objectives.row_blocks import row_blocks


class PrototypeLayer(nn.Module):
    """A weight-normalised linear layer without bias (Salimans and Kingma 2016)."""

    def __init__(self, width: int, outputs: int, fixed_gain: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(width, outputs, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(outputs, 1), requires_grad=not fixed_gain)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Inner products with the rows of v, each scaled to the length g.

        The product is in the precision of autocast, if that is on; the result in float32 at least.
        """
        kind = x.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if x.dtype == torch.float64:
            half = x.dtype  # which autocast leaves alone
        with torch.autocast(kind, enabled=False):
            out: Tensor = _Prototypes.apply(x.to(half), self.weight_v, self.weight_g)
        return out


class _Prototypes(torch.autograd.Function):
    """x v^T, each column times g / |v|; the large weights are passed over as seldom as can be.

    The outputs are scaled, not the weights: of their size there is but a copy in the precision of
    ``x``. In backward the gradient that v has through its length is a multiple of v itself, and is
    added to the one through the product: on a CPU of some rows at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "n d"], v: Float[Tensor, "k d"], g: Float[Tensor, "k 1"]
    ) -> Float[Tensor, "n k"]:
        low = v if v.dtype == x.dtype else torch.empty_like(v, dtype=x.dtype)
        length = torch.empty_like(g)
        for block in row_blocks(v):
            if low is not v:
                low[block] = v[block]
            length[block] = v[block].norm(dim=1, keepdim=True)
        products = F.linear(x, low)
        ctx.save_for_backward(x, v, g, low, length, products)
        scale, kind = (g / length).T, at_least_fp32(products[:0]).dtype
        scaled = torch.empty_like(products, dtype=kind)
        for block in row_blocks(products):
            scaled[block] = at_least_fp32(products[block]) * scale
        return scaled

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "n k"]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, v, g, low, length, products = ctx.saved_tensors
        _, moves, stretches = ctx.needs_input_grad
        scale, of_v, total = (g / length).T, None, torch.zeros_like(g.T)
        low_grad = torch.empty_like(products)
        for block in row_blocks(grad):
            total += (grad[block] * products[block]).sum(0)
            low_grad[block] = (grad[block] * scale).to(x.dtype)
        of_gain, grad = total.T / length, low_grad
        if moves:
            of_v, multiple = torch.empty_like(v), -of_gain * g / length.square()
            for block in row_blocks(v):
                through_product = grad.T[block] @ x
                torch.addcmul(through_product, v[block], multiple[block], out=of_v[block])
        return grad @ low, of_v, of_gain if stretches else None


def last_layer(width: int, prototypes: int, fixed_gain: bool, plain: bool = False) -> nn.Module:
    """Prototypes on the unit sphere; arguments are those of :class:`ProjectionHead`."""
    if plain:
        return nn.Linear(width, prototypes, bias=False)
    return PrototypeLayer(width, prototypes, fixed_gain)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) by the global batch, that of all processes.

    A part of training alone: it has no running statistics, and normalises by the batch in
    evaluation, too. All processes have as many rows.
    """

    eps = 1e-5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Features of zero mean and unit variance over the batch, then scaled and shifted."""
        if rank_and_world()[1] == 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        with torch.autocast(x.device.type, enabled=False):
            rows = at_least_fp32(x)
            mean = mean_with_gradient(rows.mean(0))
            variance = mean_with_gradient((rows - mean).square().mean(0))
            scale = self.weight * (variance + self.eps).rsqrt()
            return ((rows - mean) * scale + self.bias).to(x.dtype)


def projector(widths: Sequence[int], norm: str = "batch") -> nn.Sequential:
    """MLP with a norm and a GELU between its linear layers, of these widths.

    ``norm`` is ``batch`` or ``layer``: that of each image alone, with which a step is the same in
    any number of parts. Layers have no bias that would have no gradient: before a batch norm, and
    the last one, where only differences of projections count.
    """
    kind = BatchNorm if norm == "batch" else nn.LayerNorm
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        layers += [kind(before), nn.GELU()] if i else []
        layers.append(nn.Linear(before, after, bias=norm != "batch" and i + 2 < len(widths)))
    return nn.Sequential(*layers)


class ProjectionHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, weight-normalised prototypes (Caron et al. 2021,
    section 3.2).

    Args:
        widths: features before and after each linear layer of the MLP; the last is the bottleneck.
        prototypes: outputs.
        fixed_gain: every prototype has length 1, and is not trained in length.
        plain: the last layer is an ordinary linear one, without bias (as DINOv3's).
    """

    def __init__(
        self, widths: Sequence[int], prototypes: int, fixed_gain: bool, plain: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.GELU()] if i else []
            layers.append(nn.Linear(before, after))
        self.mlp = nn.Sequential(*layers)
        self.last_layer = last_layer(widths[-1], prototypes, fixed_gain, plain)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Inner products with the prototypes, one row an image."""
        return at_least_fp32(self.last_layer(self.on_sphere(features)))

    def on_sphere(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n w"]:
        """Input of the last layer: the bottleneck, L2-normalised."""
        return F.normalize(self.mlp(features), dim=-1)
