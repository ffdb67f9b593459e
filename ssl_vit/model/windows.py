"""Window attention (Li et al. 2022, ViTDet): patches attend to those of their own window.

Some blocks, evenly spread, stay global. [CLS] and registers, where an encoder has them, attend to
all tokens in every block, and all attend to them; of a window that is the whole image nothing
differs from global attention. Windows at the right and lower edge may be smaller: nothing is
padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssl_vit.common.errors import check
from ssl_vit.model.block import LeanAttention, LeanEvaAttention
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.rope import Rotation


@dataclass(frozen=True)
class Windows:
    """Windows of a grid of patches.

    ``groups``: patches of all windows of the same height and width, (windows, patches) each.
    ``places``: (N,) where each patch is found in all of these in a row.
    """

    groups: tuple[Int64[Tensor, "_ _"], ...]
    places: Int64[Tensor, " n"]

    @classmethod
    def of(cls, grid: tuple[int, int], side: int) -> Windows:
        """Windows of ``side`` x ``side`` patches, from the top left corner on."""
        numbers = torch.arange(math.prod(grid)).view(grid)
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for band in numbers.split(side, 0):
            for window in band.split(side, 1):
                by_shape.setdefault((window.shape[0], window.shape[1]), []).append(window.flatten())
        groups = tuple(torch.stack(windows) for windows in by_shape.values())
        return cls(groups, torch.cat([g.flatten() for g in groups]).argsort())

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        if self.places.device == device:
            return self
        return Windows(tuple(g.to(device) for g in self.groups), self.places.to(device))


class _Windowed:
    """Attention within windows; ``windows`` are those of the images' grid."""

    windows: Windows

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        *mask: Any,
        rows: slice | None = None,
        rotation: Rotation | None = None,
        attended: Bool[Tensor, " n"] | None = None,
        gamma: Float[Tensor, " w"] | None = None,
        **masks: Any,
    ) -> Tensor:
        """Block as without windows, of all tokens."""
        own: Any = self
        assert rows is None, "windows are for all tokens"
        assert attended is None, "windows are for all tokens"
        self.windows = self.windows.to(x.device)  # copied once
        q, k, v = own.project(x, None, rotation)
        dropout = own.attn_drop.p if own.training else 0.0
        attend = partial(attend_within, self.windows, fused=own.fused_attn, dropout=dropout)
        if torch.is_grad_enabled() and q.requires_grad:
            # Copies of each window's tokens, and their weights, are cheap to make again.
            random = dropout > 0
            out = checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=random)
        else:
            out = attend(q, k, v)
        return own.projected(x, rearrange(out, "b h n d -> b n (h d)"), gamma)


class WindowedAttention(_Windowed, LeanAttention):
    """timm's attention, within windows."""


class WindowedEvaAttention(_Windowed, LeanEvaAttention):
    """timm's attention of Eva, within windows."""


_WINDOWED: dict[type, type] = {
    LeanAttention: WindowedAttention,
    LeanEvaAttention: WindowedEvaAttention,
}


def attend_within(
    windows: Windows,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    fused: bool,
    dropout: float = 0.0,
) -> Float[Tensor, "b h n d"]:
    """Attention of each patch to its window and to the tokens before the patches (prefix); these
    attend to all."""
    prefix = q.shape[2] - len(windows.places)
    parts = []
    for group in windows.groups:
        taken = group.flatten() + prefix
        inner, keys, values = (
            _apart(t, taken, group.shape, prefix * (t is not q)) for t in (q, k, v)
        )
        out = _weighted(inner, keys, values, fused, dropout)
        parts.append(rearrange(out, "(b w) h n d -> b h (w n) d", w=len(group)))
    out = torch.cat(parts, dim=2)[:, :, windows.places]
    if not prefix:
        return out
    return torch.cat([_weighted(q[:, :, :prefix], k, v, fused, dropout), out], dim=2)


def _apart(
    tokens: Float[Tensor, "b h n d"], taken: Tensor, shape: torch.Size, prefix: int
) -> Float[Tensor, "bw h m d"]:
    """Tokens of each window, with ``prefix`` first tokens before them, as a batch of windows."""
    count, size = shape
    inner = rearrange(tokens[:, :, taken], "b h (w n) d -> (b w) h n d", w=count, n=size)
    if not prefix:
        return inner
    first = tokens[:, :, :prefix].repeat_interleave(count, dim=0)
    return torch.cat([first, inner], dim=2)


def _weighted(q: Tensor, k: Tensor, v: Tensor, fused: bool, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return F.dropout(weights, dropout) @ v


def use_windows(encoder: Encoder, grid: tuple[int, int], side: int, global_blocks: int) -> None:
    """Make an encoder attend within windows of ``side`` x ``side`` patches, in place, but for
    ``global_blocks`` evenly spread blocks, the last of which is the encoder's last; names and
    values of its weights stay. Its images must have this grid from now on. In training, global
    blocks keep their input alone: their attention's weights are most of what a step would hold.

    Raises:
        UserError: there are not so many blocks, or their attention is of another kind.
    """
    blocks = list(encoder.vit.blocks)
    depth = len(blocks)
    check(
        0 <= global_blocks <= depth,
        f"--detect.global-blocks is {global_blocks}; the encoder has {depth} blocks: give fewer",
    )
    ends = {(n + 1) * depth // global_blocks - 1 for n in range(global_blocks)}
    windows = Windows.of(grid, side)
    for number, block in enumerate(blocks):
        if number in ends:
            block.recomputes = True
            continue
        kind = type(block.attn)
        check(kind in _WINDOWED, f"--detect.windows is for plain ViTs, not for {kind.__name__}")
        block.attn.__class__ = _WINDOWED[kind]
        block.attn.windows = windows
