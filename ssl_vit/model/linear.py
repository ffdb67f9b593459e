"""Linear layers of a block, for less work with what goes with them: layer scale, or GELU."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Whether this CPU multiplies tiles of bfloat16 (AMX); asked here, as no compiler follows the call.
HAS_AMX: bool = torch.cpu._is_amx_tile_supported()


def some_outputs(
    linear: nn.Linear, bias: Tensor | None, x: Tensor, outputs: slice | None = None
) -> Tensor:
    """A linear layer with another bias; some of its outputs alone."""
    if outputs is None:
        return linear(x) if bias is linear.bias else F.linear(x, linear.weight, bias)
    return F.linear(x, linear.weight[outputs], None if bias is None else bias[outputs])


def times(x: Tensor, gamma: Float[Tensor, " d"] | None) -> Tensor:
    """Layer scale of what has been computed without it."""
    return x if gamma is None else gamma * x


def scaled(linear: nn.Linear, x: Tensor, gamma: Float[Tensor, " d"] | None) -> Tensor:
    """A linear layer, then layer scale."""
    return linear(x) if gamma is None else F.linear(x, *scaled_weights(linear, gamma))


def scaled_weights(
    linear: nn.Linear, gamma: Float[Tensor, " d"] | None
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " d"] | None]:
    """Weight and bias of a linear layer, scaled, so that its many results need not be: of these no
    unscaled copy is kept for backward."""
    weight, bias = linear.weight, linear.bias
    if gamma is None:
        return weight, bias
    return gamma[:, None] * weight, None if bias is None else gamma * bias


def weight_gradient(
    grad: Float[Tensor, "n d"], inputs: Float[Tensor, "n k"]
) -> Float[Tensor, "d k"]:
    """grad^T inputs, the gradient of a linear layer's weight, where d is less than k.

    With AMX oneDNN takes up to twice as long to multiply a transposed view in bfloat16 as a copy,
    and copying the narrower of the two costs less than that.
    """
    columns = grad.mT
    if grad.dtype == torch.bfloat16 and grad.device.type == "cpu" and HAS_AMX:
        columns = columns.contiguous()
    return columns @ inputs


class GeluLinear(torch.autograd.Function):
    """linear(gelu(h)); of the hidden layer h alone is kept, and gelu(h), as large, computed again.

    That is a hundredth of a step's time for a fifth of what it keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Float[Tensor, "b n k"], weight: Float[Tensor, "d k"], bias: Tensor | None
    ) -> Float[Tensor, "b n d"]:
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Float[Tensor, "b n d"]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        h, weight = ctx.saved_tensors
        of_h, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            torch.ops.aten.gelu_backward(grad @ weight, h) if of_h else None,
            weight_gradient(rows, F.gelu(h).flatten(0, -2)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
