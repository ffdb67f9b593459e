"""Attention on CPUs, in fewer passes over its queries, keys, values and weights."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_vit.model.rope import Rotation


def attend(
    qkv: Float[Tensor, "b n 3 h d"], scale: float, rotation: Rotation | None
) -> tuple[Float[Tensor, "b n hd"], Float[Tensor, "3 bh n d"], Float[Tensor, "bh n n"]]:
    """softmax(q k^T scale) v for CPUs; queries, keys and values in order; attention weights.

    The same sum as plain matmul-softmax-matmul; queries, keys and values are brought into order
    together, once, and no scaled copy is made.
    """
    b, n, _, h, d = qkv.shape
    apart = qkv.permute(2, 0, 3, 1, 4).reshape(3, b * h, n, d)
    if rotation is not None:
        rotation.turn_(apart[:2].view(2, b, h, n, d))
    q, k, v = apart.unbind()
    weights = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale).softmax(-1)
    out = torch.bmm(weights, v).view(b, h, n, d).transpose(1, 2).reshape(b, n, h * d)
    return out, apart, weights


class Attend(torch.autograd.Function):
    """``attend``, whose gradients are brought into order together, too."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Float[Tensor, "b n 3 h d"], scale: float, rotation: Rotation | None
    ) -> Float[Tensor, "b n hd"]:
        out, apart, weights = attend(qkv, scale, rotation)
        ctx.save_for_backward(apart, weights)
        ctx.scale, ctx.rotation = scale, rotation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "b n hd"]) -> tuple[Tensor, None, None]:
        apart, weights = ctx.saved_tensors
        q, k, v = apart.unbind()
        b, (n, d) = len(grad), q.shape[1:]
        heads = grad.shape[2] // d  # stochastic depth may keep no image at all
        grad = grad.view(b, n, heads, d).transpose(1, 2).reshape(q.shape)
        own = torch.empty_like(apart)
        torch.bmm(weights.mT, grad, out=own[2])
        inner = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype)
        torch.baddbmm(own[0], inner, k, beta=0, alpha=ctx.scale, out=own[0])
        torch.baddbmm(own[1], inner.mT, q, beta=0, alpha=ctx.scale, out=own[1])
        own = own.view(3, b, heads, n, d)
        if ctx.rotation is not None:
            ctx.rotation.turn_(own[:2], back=True)
        return own.permute(1, 3, 0, 2, 4), None, None
