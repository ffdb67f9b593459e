"""Transformer block of training: weights, names and numbers of timm's, for less work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssl_vit.model.drop_path import DropPath, redraw


def _attend(
    qkv: Float[Tensor, "b n 3 h d"], scale: float
) -> tuple[Float[Tensor, "b n hd"], Float[Tensor, "3 bh n d"], Float[Tensor, "bh n n"]]:
    """softmax(q k^T scale) v for CPUs; queries, keys and values in order; attention weights.

    The same sum as plain matmul-softmax-matmul; queries, keys and values are brought into order
    together, once, and no scaled copy is made.
    """
    b, n, _, h, d = qkv.shape
    apart = qkv.permute(2, 0, 3, 1, 4).reshape(3, b * h, n, d)
    q, k, v = apart.unbind()
    weights = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale).softmax(-1)
    out = torch.bmm(weights, v).view(b, h, n, d).transpose(1, 2).reshape(b, n, h * d)
    return out, apart, weights


class _Attend(torch.autograd.Function):
    """``_attend``, whose gradients are brought into order together, too."""

    @staticmethod
    def forward(ctx: Any, qkv: Float[Tensor, "b n 3 h d"], scale: float) -> Float[Tensor, "b n hd"]:
        out, apart, weights = _attend(qkv, scale)
        ctx.save_for_backward(apart, weights)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "b n hd"]) -> tuple[Tensor, None]:
        apart, weights = ctx.saved_tensors
        q, k, v = apart.unbind()
        b, (n, d) = len(grad), q.shape[1:]
        grad = grad.view(b, n, -1, d).transpose(1, 2).reshape(q.shape)
        own = torch.empty_like(apart)
        torch.bmm(weights.mT, grad, out=own[2])
        inner = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype)
        torch.baddbmm(own[0], inner, k, beta=0, alpha=ctx.scale, out=own[0])
        torch.baddbmm(own[1], inner.mT, q, beta=0, alpha=ctx.scale, out=own[1])
        return own.view(3, b, -1, n, d).permute(1, 3, 0, 2, 4), None


class LeanAttention(Attention):
    """timm's attention; of some tokens alone if so asked, and without needless copies on CPUs."""

    def forward(self, x: Tensor, *mask: Any, rows: slice | None = None, **masks: Any) -> Tensor:
        """As timm's for (B, N, D) tokens; ``rows``: of these tokens only, attending to all."""
        if any(value is not None and value is not False for value in (*mask, *masks.values())):
            assert rows is None, "a mask is for all tokens"
            return super().forward(x, *mask, **masks)
        dropout = self.attn_drop.p if self.training else 0.0
        normed = any(not isinstance(m, nn.Identity) for m in (self.q_norm, self.k_norm))
        if rows is None and not (self.fused_attn or normed or dropout) and x.device.type == "cpu":
            qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
            grad = torch.is_grad_enabled()
            out = _Attend.apply(qkv, self.scale) if grad else _attend(qkv, self.scale)[0]
        else:
            q, k, v = self.project(x, rows)
            if self.fused_attn:
                out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            else:
                out = self.attn_drop(((q * self.scale) @ k.mT).softmax(dim=-1)) @ v
            out = rearrange(out, "b h n d -> b n (h d)")
        out = self.norm(out)
        gate = getattr(self, "gate", None)  # which older releases lack
        if gate is not None:
            out = out * gate(x if rows is None else x[:, rows]).sigmoid()
        return self.proj_drop(self.proj(out))

    def project(
        self, x: Float[Tensor, "b n w"], rows: slice | None = None
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Queries (of ``rows``, if not of all), keys and values."""
        heads = self.num_heads
        if rows is None:
            qkv = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=heads)
            q, k, v = qkv.unbind()
        else:
            width = self.qkv.out_features // 3
            q = _part(self.qkv, x[:, rows], slice(0, width))
            kv = _part(self.qkv, x, slice(width, None))
            q = rearrange(q, "b m (h d) -> b h m d", h=heads)
            k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=heads).unbind()
        return self.q_norm(q), self.k_norm(k), v


def _part(linear: Any, x: Tensor, outputs: slice) -> Tensor:
    """Some of a linear layer's outputs."""
    bias = None if linear.bias is None else linear.bias[outputs]
    return F.linear(x, linear.weight[outputs], bias)


class _GeluLinear(torch.autograd.Function):
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
            rows.mT @ F.gelu(h).flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class LeanMlp(Mlp):
    """timm's MLP, which keeps its hidden layer for backward once, not before and after GELU.

    With gradients on, hooks upon ``act`` and ``fc2`` are not called, and transforms of
    ``torch.func`` are not for it, nor for attention on CPUs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As timm's."""
        act, dropout = self.act, self.drop1.p if self.training else 0.0
        plain = type(act) is nn.GELU and act.approximate == "none" and type(self.fc2) is nn.Linear
        plain = plain and isinstance(self.norm, nn.Identity) and not dropout
        if not (plain and torch.is_grad_enabled()):
            return super().forward(x)
        h = self.fc1(x)
        weight, bias = self.fc2.weight.to(h.dtype), self.fc2.bias
        bias = None if bias is None else bias.to(h.dtype)
        return self.drop2(_GeluLinear.apply(h, weight, bias))


class LeanBlock(Block):
    """timm's block. Stochastic depth leaves out the work on what it drops.

    ``recomputes``: in training it keeps its input alone, and computes the rest again in backward.
    That is inside the block's own call: hooks upon the block or its parts (FSDP's, which gather
    weights) are met then as in ``forward``. ``whole``: stochastic depth computes all, and drops
    then: a compiler starts anew for each number of rows.
    """

    recomputes = False
    whole = False

    def forward(self, x: Tensor, *mask: Any, rows: slice | None = None, **masks: Any) -> Tensor:
        """As timm's block for (B, N, D) tokens; ``rows``: of these tokens only, of all the rest
        nothing but keys and values."""

        if not (self.recomputes and self.training and torch.is_grad_enabled()):
            return self._layers(x, *mask, rows=rows, **masks)
        # The compiler takes no context; and what it compiles whole has nothing to draw.
        drops = not isinstance(self.drop_path1, nn.Identity)
        context: dict[str, Any] = {"context_fn": redraw} if drops else {}
        layers = self._layers
        return checkpoint(layers, x, *mask, use_reentrant=False, **context, rows=rows, **masks)

    def _layers(self, x: Tensor, *mask: Any, rows: slice | None, **masks: Any) -> Tensor:
        def attend(some: Tensor) -> Tensor:
            if rows is not None and isinstance(self.attn, LeanAttention):
                return self.ls1(self.attn(some, rows=rows))
            out = self.ls1(self.attn(some, *mask, **masks))
            return out if rows is None else out[:, rows]

        def perceive(some: Tensor) -> Tensor:
            return self.ls2(self.mlp(some))

        # Norms are of all rows: those of some alone would keep another copy of their input.
        out = self._add(x if rows is None else x[:, rows], self.norm1(x), attend, self.drop_path1)
        return self._add(out, self.norm2(out), perceive, self.drop_path2)

    def _add(self, to: Tensor, x: Tensor, branch: Any, drop: nn.Module) -> Tensor:
        if self.whole or not isinstance(drop, DropPath):
            return to + drop(branch(x))
        return drop.add(to, x, branch)


def nothing_spared(network: nn.Module) -> AbstractContextManager[None]:
    """Inside, blocks compute what stochastic depth drops too: the most that a step may cost."""
    return _set(network, "whole", True)


def recomputing_nothing(network: nn.Module) -> AbstractContextManager[None]:
    """Inside, blocks keep their activations, whatever they were told."""
    return _set(network, "recomputes", False)


@contextmanager
def _set(network: nn.Module, name: str, value: bool) -> Iterator[None]:
    blocks = [part for part in network.modules() if isinstance(part, LeanBlock)]
    before = [getattr(block, name) for block in blocks]
    try:
        for block in blocks:
            setattr(block, name, value)
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            setattr(block, name, old)


def lean_blocks(network: nn.Module) -> None:
    """Give every plain transformer block of a network, its attention and its MLP, the class here.

    In place: states, names of weights and whatever refers to the blocks stay.
    """
    for part in network.modules():
        if type(part) is Block:
            part.__class__ = LeanBlock
        elif type(part) is Attention:
            part.__class__ = LeanAttention
        elif type(part) is Mlp:
            part.__class__ = LeanMlp
