"""Architecture inference for encoders with rotary positions: timm's DINOv3, from their tensors."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import timm

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check
from ssl_vit.model.architecture import rotary_architectures, without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.grids import Hints
from ssl_vit.weights.shapes import (
    Inferred,
    State,
    change,
    count_blocks,
    count_registers,
    projection,
)

# Heads by width, where it is not one for every 64 features.
_HEADS = {4096: 32}


def infer_rotary(state: State, where: str, hints: Hints) -> Inferred:
    """Infer the architecture of a DINOv3 from names and shapes.

    There is no table of positions, so that the size of images, which may be any, is that of the
    configuration, or timm's.

    Raises:
        UserError: the shapes are not those of a DINOv3 of timm.
    """
    width, channels, patch = projection(state, where)
    heads = hints.heads or _HEADS.get(width, width // 64)
    check(
        heads > 0 and width % (4 * heads) == 0 and (hints.heads > 0 or width % 64 == 0),
        f"{where}: its width is {width}, whose attention heads are unknown; known: 4096 and "
        "multiples of 64, or num_attention_heads in a config.json beside it",
    )
    depth = count_blocks(state, where)
    arch = hints.arch or _arch(state, width, heads, where)
    pooled = "fc_norm.weight" in state
    with without_memory():
        model = Encoder(EncoderConfig(arch, norm="pooled" if pooled else "tokens"))
    first: Any = model.vit.blocks[0]
    registers = count_registers(state, width, where)
    size = hints.image_size or (model.grid[0] * patch, model.grid[1] * patch)
    config = dataclasses.replace(
        model.config,
        image_size=() if size == model.image_size else tuple(dict.fromkeys(size)),
        patch_size=change(patch, model.patch_size),
        width=change(width, model.width),
        depth=change(depth, len(model.vit.blocks)),
        heads=change(heads, first.attn.num_heads),
        registers=-1 if model.vit.num_prefix_tokens == 1 + registers else registers,
        norm_eps=0.0 if hints.norm_eps == first.norm1.eps else hints.norm_eps,
        rope_periods=hints.rope_periods or model.config.rope_periods,
    )
    # Only timm's own files do not say that they are of a DINOv3.
    guessed = not hints.arch and not hints.rope_periods
    return Inferred(config, channels, f"taken for {arch} by its shapes" if guessed else "")


def _arch(state: State, width: int, heads: int, where: str) -> str:
    """Name of timm's architecture with such blocks: that of this width, or of another."""
    gate, bias, plain = (
        "blocks.0.mlp.fc1_g.weight",
        "blocks.0.attn.q_bias",
        "blocks.0.mlp.fc1.weight",
    )
    hidden = gate if gate in state else plain
    wanted = {name: tuple(state[name].shape) for name in (hidden, bias) if name in state}
    check(hidden in wanted, f"{where}: missing {plain}, or {gate}")
    own_widths: dict[str, int] = {}
    for arch in rotary_architectures():
        own_width, shapes = _of_timm(arch, width, heads)
        if {name: shapes[name] for name in (gate, plain, bias) if name in shapes} == wanted:
            own_widths[arch] = own_width
    check(
        bool(own_widths),
        f"{where}: timm has no DINOv3 of width {width} with {hidden} {wanted[hidden]} "
        f"{'and' if bias in wanted else 'but without'} biases of queries and values",
    )
    return min(own_widths, key=lambda arch: (own_widths[arch] != width, own_widths[arch]))


@cache
def _of_timm(arch: str, width: int, heads: int) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Width of timm's architecture, and shapes in one block of it at another width."""
    with without_memory():
        own: Any = timm.create_model(arch, num_classes=0, depth=1)
        made = timm.create_model(arch, num_classes=0, depth=1, embed_dim=width, num_heads=heads)
    return own.embed_dim, {name: tuple(p.shape) for name, p in made.named_parameters()}
