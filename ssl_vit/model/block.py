"""Transformer block of training: weights, names and numbers of timm's, for less work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from timm.layers import Attention, Mlp
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssl_vit.model.attend import Attend, attend
from ssl_vit.model.drop_path import DropPath, add_whole, factors_of, redraw
from ssl_vit.model.linear import GeluLinear, scaled, scaled_weights, some_outputs, times
from ssl_vit.model.rope import Rotation


class _Lean:
    """Attention of some tokens alone if so asked, and without needless copies on CPUs."""

    qkv: nn.Linear
    num_heads: int

    def forward(
        self,
        x: Tensor,
        *mask: Any,
        rows: slice | None = None,
        rotation: Rotation | None = None,
        attended: Bool[Tensor, " n"] | None = None,
        gamma: Float[Tensor, " d"] | None = None,
        **masks: Any,
    ) -> Tensor:
        """Attention as timm's for (B, N, D) tokens; ``rows``: of these tokens only, attending to
        all; ``rotation``: of queries and keys; ``attended``: the tokens attended to (None: all);
        ``gamma``: layer scale of the result."""
        own: Any = self
        if any(value is not None and value is not False for value in (*mask, *masks.values())):
            assert rows is None, "a mask is for all tokens"
            assert attended is None, "a mask states what is attended to"
            found: Tensor = super().forward(x, *mask, **masks)  # type: ignore[misc]
            return times(found, gamma)
        dropout = own.attn_drop.p if own.training else 0.0
        normed = any(not isinstance(m, nn.Identity) for m in (own.q_norm, own.k_norm))
        whole = rows is None and attended is None
        if whole and not (own.fused_attn or normed or dropout) and x.device.type == "cpu":
            qkv = some_outputs(self.qkv, self._bias(), x).unflatten(-1, (3, self.num_heads, -1))
            args = qkv, own.scale, rotation
            out = Attend.apply(*args) if torch.is_grad_enabled() else attend(*args)[0]
        else:
            q, k, v = self.project(x, rows, rotation)
            if own.fused_attn:
                keys = None if attended is None else attended.view(1, 1, 1, -1)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout)
            else:
                scores = (q * own.scale) @ k.mT
                scores = scores if attended is None else scores.masked_fill(~attended, -math.inf)
                out = own.attn_drop(scores.softmax(dim=-1)) @ v
            out = rearrange(out, "b h n d -> b n (h d)")
        return self.projected(x if rows is None else x[:, rows], out, gamma)

    def projected(
        self,
        x: Float[Tensor, "b n w"],
        out: Float[Tensor, "b n hd"],
        gamma: Float[Tensor, " w"] | None,
    ) -> Float[Tensor, "b n w"]:
        """Layers after the weighted sum of values: norm, gate and projection, scaled by layer
        scale; ``x``: the tokens whose sums they are."""
        own: Any = self
        out = own.norm(out)
        gate = getattr(self, "gate", None)  # which older releases lack
        if gate is not None:
            out = out * gate(x).sigmoid()
        return own.proj_drop(scaled(own.proj, out, gamma))

    def project(
        self,
        x: Float[Tensor, "b n w"],
        rows: slice | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """Queries (of ``rows``, if not of all), keys and values; the first two turned, if so."""
        own: Any = self
        heads, bias = self.num_heads, self._bias()
        if rows is None:
            joined = some_outputs(self.qkv, bias, x)
            q, k, v = rearrange(joined, "b n (t h d) -> t b h n d", t=3, h=heads).unbind()
        else:
            width = self.qkv.out_features // 3
            q = some_outputs(self.qkv, bias, x[:, rows], slice(0, width))
            kv = some_outputs(self.qkv, bias, x, slice(width, None))
            q = rearrange(q, "b m (h d) -> b h m d", h=heads)
            k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=heads).unbind()
        q, k = own.q_norm(q), own.k_norm(k)
        if rotation is not None:
            q, k = rotation.rows(rows)(q), rotation(k)
        return q, k, v

    def _bias(self) -> Tensor | None:
        return self.qkv.bias


class LeanAttention(_Lean, Attention):
    """timm's attention, for less work."""


class LeanEvaAttention(_Lean, EvaAttention):
    """timm's attention of Eva, whose keys have no bias."""

    def _bias(self) -> Tensor | None:
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class LeanMlp(Mlp):
    """timm's MLP, which keeps its hidden layer for backward once, not before and after GELU.

    With gradients on, hooks upon ``act`` and ``fc2`` are not called, and transforms of
    ``torch.func`` are not for it, nor for attention on CPUs.
    """

    def forward(self, x: Tensor, gamma: Float[Tensor, " d"] | None = None) -> Tensor:
        """MLP as timm's; ``gamma``: layer scale of the result."""
        act, dropout = self.act, self.drop1.p if self.training else 0.0
        plain = type(act) is nn.GELU and act.approximate == "none" and type(self.fc2) is nn.Linear
        plain = plain and isinstance(self.norm, nn.Identity) and not dropout
        if not plain:
            found: Tensor = super().forward(x)
            return times(found, gamma)
        assert isinstance(self.fc2, nn.Linear)
        h = self.fc1(x)
        if not torch.is_grad_enabled():
            return self.drop2(scaled(self.fc2, act(h), gamma))
        weight, bias = scaled_weights(self.fc2, gamma)
        bias = None if bias is None else bias.to(h.dtype)
        return self.drop2(GeluLinear.apply(h, weight.to(h.dtype), bias))


class LeanResidual(nn.Module):
    """A transformer block in which stochastic depth leaves out the work on what it drops.

    ``recomputes``: in training it keeps its input alone, and computes the rest again in backward.
    That is inside the block's own call: hooks upon the block or its parts (FSDP's, which gather
    weights) are met then as in ``forward``. ``whole``: stochastic depth computes all, and drops
    then: a compiler, and a GPU's kernels, start anew for each number of rows. ``compiled``: what
    follows the draws is compiled whole.
    """

    recomputes = False
    whole = False
    compiled = False

    def forward(
        self,
        x: Tensor,
        *mask: Any,
        rows: slice | None = None,
        rotation: Rotation | None = None,
        attended: Bool[Tensor, " n"] | None = None,
        **masks: Any,
    ) -> Tensor:
        """Block as timm's for (B, N, D) tokens; ``rows``: of these tokens only, of all the rest
        nothing but keys and values; ``rotation``: of queries and keys, from the tokens' places;
        ``attended``: the tokens that any token attends to, where others are padding."""
        masks |= {} if attended is None else {"attended": attended}
        own: Any = self
        # Drawn before: what is compiled neither draws nor knows this block's own probability.
        drops = factors_of((own.drop_path1, own.drop_path2), x) if self.whole else None
        layers = _compiled() if self.compiled else LeanResidual._layers
        inputs, options = (self, x, drops, *mask), {"rows": rows, "rotation": rotation, **masks}
        if not (self.recomputes and self.training and torch.is_grad_enabled()):
            return layers(*inputs, **options)
        context: dict[str, Any] = {} if self.whole else {"context_fn": redraw}
        return checkpoint(layers, *inputs, use_reentrant=False, **context, **options)

    def _layers(
        self,
        x: Tensor,
        drops: tuple[Tensor, Tensor] | None,
        *mask: Any,
        rows: slice | None,
        rotation: Rotation | None,
        **masks: Any,
    ) -> Tensor:
        """``drops``: factors of the rows of both branches, where all rows are computed."""
        own: Any = self

        def attend(some: Tensor, kept: Tensor | None) -> Tensor:
            turn = {} if rotation is None else {"rotation": rotation.images(kept)}
            gamma = self._gamma(1)
            if isinstance(own.attn, LeanAttention | LeanEvaAttention):
                return own.attn(some, *mask, rows=rows, gamma=gamma, **turn, **masks)
            out = own.attn(some, *mask, **turn, **masks)
            return times(out if rows is None else out[:, rows], gamma)

        def perceive(some: Tensor, kept: Tensor | None) -> Tensor:
            gamma = self._gamma(2)
            if isinstance(own.mlp, LeanMlp):
                return own.mlp(some, gamma)
            return times(own.mlp(some), gamma)

        first, second = (own.drop_path1, own.drop_path2) if drops is None else drops
        # Norms are of all rows: those of some alone would keep another copy of their input.
        out = _add(x if rows is None else x[:, rows], own.norm1(x), attend, first)
        return _add(out, own.norm2(out), perceive, second)

    def _gamma(self, branch: int) -> Float[Tensor, " d"] | None:
        """Layer scale of a branch, where there is one."""
        raise NotImplementedError


def _add(to: Tensor, x: Tensor, branch: Any, drop: nn.Module | Tensor) -> Tensor:
    """``to``, and the branch of ``x`` after stochastic depth, or times factors of its rows."""
    if isinstance(drop, DropPath):
        return drop.add(to, x, branch)
    out = branch(x, None)
    return add_whole(to, out, drop) if isinstance(drop, Tensor) else to + drop(out)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Layers of any block, compiled: blocks of the same shapes share what is made."""
    compiled: Callable[..., Tensor] = torch.compile(LeanResidual._layers, dynamic=False)
    return compiled


class LeanBlock(LeanResidual, Block):
    """timm's block, for less work."""

    def _gamma(self, branch: int) -> Tensor | None:
        return getattr(self.ls1 if branch == 1 else self.ls2, "gamma", None)


class LeanEvaBlock(LeanResidual, EvaBlock):
    """timm's block of Eva, for less work."""

    def forward(self, x: Tensor, *mask: Any, rope: Tensor | None = None, **options: Any) -> Tensor:
        """``rope``: as Eva itself gives it, sines and cosines of all patches."""
        if rope is None:
            return super().forward(x, *mask, **options)
        if rope.ndim != 2 or not self.attn.rotate_half:
            return super().forward(x, *mask, rope=rope, **options)
        rotation = Rotation.of_timm(rope, self.attn.num_prefix_tokens)
        return super().forward(x, *mask, rotation=rotation, **options)

    def _gamma(self, branch: int) -> Tensor | None:
        return self.gamma_1 if branch == 1 else self.gamma_2


_LEAN: dict[type, type] = {
    Attention: LeanAttention,
    Block: LeanBlock,
    EvaAttention: LeanEvaAttention,
    EvaBlock: LeanEvaBlock,
    Mlp: LeanMlp,
}


def nothing_spared(network: nn.Module) -> AbstractContextManager[None]:
    """Context in which blocks compute what stochastic depth drops too: the most that a step may
    cost."""
    return _set(network, "whole", True)


def recomputing_nothing(network: nn.Module) -> AbstractContextManager[None]:
    """Context in which blocks keep their activations, whatever their checkpointing is set to."""
    return _set(network, "recomputes", False)


@contextmanager
def _set(network: nn.Module, name: str, value: bool) -> Iterator[None]:
    blocks = [part for part in network.modules() if isinstance(part, LeanResidual)]
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
        part.__class__ = _LEAN.get(type(part), type(part))
