"""Architecture inference: an encoder's config from the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError, check
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder, sincos_positions

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
class Hints:
    """Architecture hints from configuration files or the user, where shapes are ambiguous."""

    arch: str = ""
    heads: int = 0
    norm_eps: float = 0.0
    image_size: tuple[int, int] | None = None


def config_of(state: State, where: str, hints: Hints) -> tuple[EncoderConfig, int]:
    """Infer the architecture, as changes to one of timm's, and the image channels.

    Positions are assumed to be a square grid unless ``hints`` differ. The number of heads is the
    standard one of a width, else one per 64 features.

    Raises:
        UserError: the shapes are not those of a Vision Transformer that can be built.
    """
    width, channels, patch = _projection(state, where)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    prefix = registers + ("cls_token" in state)
    position = tuple(state["pos_embed"].shape)
    fits = len(position) == 3 and position[0] == 1 and position[2] == width
    check(fits, f"{where}: pos_embed is {position}; expected (1, positions, {width})")
    depth = len({found[1] for k in state if (found := re.match(r"blocks\.(\d+)\.", k))})
    check(depth > 0, f"{where}: no blocks.0 among its tensors")
    embeds = _embeds(position[1], prefix, patch, hints)
    arch = hints.arch or _arch(state, width, embeds, where)
    pooled = "fc_norm.weight" in state
    with without_memory():
        model = Encoder(EncoderConfig(arch, norm="pooled" if pooled else "tokens"))
    first: Any = model.vit.blocks[0]
    size = _image_size(position[1], prefix, patch, hints, model, where)
    scaled = not isinstance(first.ls1, nn.Identity)
    config = dataclasses.replace(
        model.config,
        image_size=() if size == model.image_size else tuple(dict.fromkeys(size)),
        patch_size=_change(patch, model.patch_size),
        width=_change(width, model.width),
        depth=_change(depth, len(model.vit.blocks)),
        heads=_change(hints.heads or _heads(width, model, where), first.attn.num_heads),
        registers=-1 if registers == model.vit.num_reg_tokens else registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state and not scaled else 0.0,
        norm_eps=0.0 if hints.norm_eps == first.norm1.eps else hints.norm_eps,
        positions=_positions(state["pos_embed"], size, patch),
    )
    return config, channels


def _positions(found: Tensor, size: tuple[int, int], patch: int) -> Literal["learned", "sincos"]:
    """Kind of positions: MAE's sine-cosine ones, which stay fixed, or learned ones."""
    rows, columns = size[0] // patch, size[1] // patch
    if found.is_meta or found.shape[2] % 4 or found.shape[1] < rows * columns:
        return "learned"
    patches = found[0, found.shape[1] - rows * columns :]
    fixed = sincos_positions((rows, columns), found.shape[2])
    return "sincos" if torch.allclose(patches.float(), fixed, atol=1e-4) else "learned"


def _change(found: int, own: int) -> int:
    """Config value of a number: 0 where it equals the architecture's default."""
    return 0 if found == own else found


def _projection(state: State, where: str) -> tuple[int, int, int]:
    """Width, channels and patch size in pixels, of the patch projection."""
    shape = tuple(state["patch_embed.proj.weight"].shape)
    message = f"{where}: patch_embed.proj.weight is {shape}; expected (width, channels, P, P)"
    check(len(shape) == 4 and shape[2] == shape[3] and min(shape) > 0, message)
    return shape[0], shape[1], shape[2]


def _embeds(positions: int, prefix: int, patch: int, hints: Hints) -> bool:
    """True if prefix tokens have positions."""
    if hints.image_size:
        return positions != math.prod(side // patch for side in hints.image_size)
    return _square(positions - prefix) > 0 or _square(positions) == 0


def _square(number: int) -> int:
    """Side of a square grid with this number of patches; 0 if not a square."""
    side = math.isqrt(max(number, 0))
    return side if side * side == number else 0


def _image_size(
    positions: int, prefix: int, patch: int, hints: Hints, model: Encoder, where: str
) -> tuple[int, int]:
    """Image height and width in pixels for this number of positions."""
    if hints.image_size:
        return hints.image_size
    patches = positions - (0 if model.vit.no_embed_class else prefix)
    if patches == math.prod(model.grid):
        return (model.grid[0] * patch, model.grid[1] * patch)
    side = _square(patches)
    check(side > 0, f"{where}: pos_embed has {patches} positions for patches; not a square grid")
    return (side * patch, side * patch)


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
