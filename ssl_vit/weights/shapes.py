"""Architecture inference: an encoder's config from the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError, check
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.grids import Hints, find_grid, prefix_has_positions

State = dict[str, Tensor]
# By width: timm's plain ViTs, those of DINOv2, and the heads of either (not in any shape).
_PLAIN = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
    1408: "vit_giant_patch14_224",
    1664: "vit_gigantic_patch14_224",
}
_DINOV2 = {384: "small", 768: "base", 1024: "large"}
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}


@dataclass(frozen=True)
class Inferred:
    """Inferred architecture: changes to one of timm's, image channels, and what is assumed."""

    config: EncoderConfig
    channels: int
    note: str


def infer(state: State, where: str, hints: Hints) -> Inferred:
    """Infer the architecture from names and shapes, and the grid of positions from their values.

    The number of heads is the standard one of a width, else one per 64 features.

    Raises:
        UserError: the shapes are not those of a Vision Transformer that can be built.
    """
    width, channels, patch = projection(state, where)
    registers = count_registers(state, width, where)
    prefix = registers + ("cls_token" in state)
    position = tuple(state["pos_embed"].shape)
    fits = len(position) == 3 and position[0] == 1 and position[2] == width
    check(fits, f"{where}: pos_embed is {position}; expected (1, positions, {width})")
    depth = count_blocks(state, where)
    # Only networks with registers or layer scale leave [CLS] without a position.
    plain = not registers and "blocks.0.ls1.gamma" not in state
    embeds = plain or prefix_has_positions(position[1], prefix, patch, hints)
    arch = hints.arch or _arch(state, width, embeds, where)
    pooled = "fc_norm.weight" in state
    with without_memory():
        model = Encoder(EncoderConfig(arch, norm="pooled" if pooled else "tokens"))
    first: Any = model.vit.blocks[0]
    table = state["pos_embed"][0, 0 if model.vit.no_embed_class else prefix :]
    grid = find_grid(table, patch, hints, model.grid if hints.arch else None, where)
    size = (grid.rows * patch, grid.columns * patch)
    scaled = not isinstance(first.ls1, nn.Identity)
    config = dataclasses.replace(
        model.config,
        image_size=() if size == model.image_size else tuple(dict.fromkeys(size)),
        patch_size=change(patch, model.patch_size),
        width=change(width, model.width),
        depth=change(depth, len(model.vit.blocks)),
        heads=change(hints.heads or _heads(width, model, where), first.attn.num_heads),
        registers=-1 if registers == model.vit.num_reg_tokens else registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state and not scaled else 0.0,
        norm_eps=0.0 if hints.norm_eps == first.norm1.eps else hints.norm_eps,
        positions="sincos" if grid.fixed else "learned",
    )
    return Inferred(config, channels, grid.note)


def count_blocks(state: State, where: str) -> int:
    """Number of blocks.

    Raises:
        UserError: there are none.
    """
    depth = len({found[1] for k in state if (found := re.match(r"blocks\.(\d+)\.", k))})
    check(depth > 0, f"{where}: no blocks.0 among its tensors")
    return depth


def count_registers(state: State, width: int, where: str) -> int:
    """Number of register tokens.

    Raises:
        UserError: they are of another shape than tokens.
    """
    if "reg_token" not in state:
        return 0
    shape = tuple(state["reg_token"].shape)
    fits = len(shape) == 3 and (shape[0], shape[2]) == (1, width)
    check(fits, f"{where}: reg_token is {shape}; expected (1, registers, {width})")
    return shape[1]


def change(found: int, own: int) -> int:
    """Config value of a number: 0 where it equals the architecture's default."""
    return 0 if found == own else found


def projection(state: State, where: str) -> tuple[int, int, int]:
    """Width, channels and patch size in pixels, of the patch projection."""
    shape = tuple(state["patch_embed.proj.weight"].shape)
    message = f"{where}: patch_embed.proj.weight is {shape}; expected (width, channels, P, P)"
    check(len(shape) == 4 and shape[2] == shape[3] and min(shape) > 0, message)
    return shape[0], shape[1], shape[2]


def _heads(width: int, model: Encoder, where: str) -> int:
    """Number of attention heads for a width."""
    own: Any = model.vit.blocks[0].attn
    if width == model.width:
        return int(own.num_heads)
    if width not in _HEADS and width % 64:
        raise UserError(
            f"{where}: its width is {width}, whose attention heads are unknown; known: those of "
            f"{', '.join(map(str, _HEADS))} and multiples of 64, or in a config.json beside it"
        )
    return _HEADS.get(width, width // 64)


def _arch(state: State, width: int, embeds: bool, where: str) -> str:
    """Name of the closest timm architecture."""
    message = f"{where}: it has no cls_token; give its architecture, as in timm:NAME:{where}"
    check("cls_token" in state, message)
    first, second = (state.get(f"blocks.0.mlp.{part}.weight") for part in ("fc1", "fc2"))
    matrices = first is not None and second is not None and first.ndim == second.ndim == 2
    gated = matrices and first.shape[0] == 2 * second.shape[1]  # type: ignore[union-attr]
    if not gated and embeds and "blocks.0.ls1.gamma" not in state:
        return _PLAIN.get(width, "vit_base_patch16_224")
    size = "giant" if gated else _DINOV2.get(width, "base")
    return f"vit_{size}_patch14_{'' if embeds else 'reg4_'}dinov2"
