"""[CLS] attention: features of the token for less work, its attention maps, and their picture."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.errors import check
from ssl_vit.common.figures import enlarged, heat, picture_rows
from ssl_vit.common.task import at_least_fp32
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.rope import Rotation

_WIDTH = 1400
_GOLDEN = 0.618034
_NO_CLS = "the encoder has no [CLS], which is asked for"


def cls_features(
    encoder: Encoder, images: Float[Tensor, "b c h w"], norm: nn.Module | None = None
) -> Float[Tensor, "b d"]:
    """The same as ``encoder(images).cls``, for less work; ``norm``: in the final norm's place.

    The last block computes the row of [CLS] alone: keys and values of all tokens, but query,
    projection and MLP of one. That saves 5/6 of a block: 7 % of twelve.

    Raises:
        UserError: the encoder has no [CLS], or the patch does not divide the images.
    """
    x, last, turn = _before_last_block(encoder, images)
    return (norm or encoder.vit.norm)(last(x, rows=slice(0, 1), **turn))[:, 0]


def _before_last_block(
    encoder: Encoder, images: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b m d"], Any, dict[str, Rotation]]:
    """All tokens, [CLS] first, as the last block gets them; that block, and their rotation."""
    check(encoder.vit.cls_token is not None, _NO_CLS)
    tokens = encoder.embed(images)
    x = encoder.with_prefix(tokens)
    *before, (last, turn) = encoder.blocks(tokens)
    for block, own in before:
        x = block(x, **own)
    return x, last, turn


def cls_attention_rows(
    encoder: Encoder, images: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b heads m"]:
    """Attention of [CLS] in the last block over all tokens, prefix tokens ([CLS] first) included.

    Each row is softmax(q k^T / sqrt(d)) of the head's query of [CLS] (Vaswani et al. 2017), in
    float32 at least, without dropout; it sums to one. Images are normalised, of any size that the
    patch divides.

    Raises:
        UserError: the encoder has no [CLS], or the patch does not divide the images.
    """
    x, last, turn = _before_last_block(encoder, images)
    # Fused kernels never hold the probabilities, so the row is computed here, from the
    # projections of the block's own attention.
    q, k, _ = last.attn.project(last.norm1(x), slice(0, 1), **turn)
    # Not a matrix product, which autocast would round to bfloat16.
    return ((at_least_fp32(q) * last.attn.scale) * at_least_fp32(k)).sum(-1).softmax(dim=-1)


def cls_attention(
    encoder: Encoder, images: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b heads n"], tuple[int, int]]:
    """Attention of [CLS] in the last block over the patches, row by row, and their grid.

    The patches' part of :func:`cls_attention_rows`: what a head gives to [CLS] and registers is
    left out and not made up for, so a head's numbers sum to one or less. Raises as that does.
    """
    rows = cls_attention_rows(encoder, images)
    return rows[:, :, encoder.vit.num_prefix_tokens :], encoder.grid_of(images)


def mass_mask(attention: Float[Tensor, "b heads n"], mass: float) -> Bool[Tensor, "b heads n"]:
    """Mask of each head's smallest set of patches that holds ``mass`` of its attention to patches.

    The thresholding of Caron et al. (2021, figure 4: 60 %). ``mass`` lies in (0, 1]; of equal
    patches the first are taken, and at least one always is.
    """
    values, order = attention.sort(dim=-1, descending=True, stable=True)
    held = values.cumsum(-1)
    # A patch is wanted while those before it do not hold enough.
    wanted = F.pad(held[..., :-1], (1, 0)) < mass * held[..., -1:]
    wanted[..., 0] = True
    return torch.zeros_like(wanted).scatter(-1, order, wanted)


def attention_panel(
    images: UInt8[np.ndarray, "b h w 3"],
    attention: Float[Tensor, "b heads n"],
    grid: tuple[int, int],
    mass: float = 0.6,
    whose: str = "[CLS] in the last block",
) -> UInt8[np.ndarray, "height width 3"]:
    """Attention maps as one picture: for each image the image itself and what its heads look at.

    Cells: the image; the mean over heads as a heat map upon it; the image where the mean holds
    ``mass`` of its attention, dimmed elsewhere; the patches that hold ``mass`` of each head's,
    in the colour of the head that looks there most; then a heat map a head, framed in its colour.
    ``whose``: attention, for the caption.
    """
    shown = enlarged(images)
    size = (shown.shape[1], shown.shape[2])
    attention = attention.detach().float().cpu()
    heads = attention.shape[1]
    colours = head_colours(heads)
    mean = attention.mean(1, keepdim=True)
    kept = _to_size(mass_mask(mean, mass), grid, size)[:, 0, :, :, None]
    maps = heat(_to_size(_stretched(attention), grid, size))
    share = f"{100 * mass:g} %"
    columns = {
        "image": shown,
        "mean of heads": _mix(shown, heat(_to_size(_stretched(mean), grid, size)[:, 0]), 0.65),
        f"mean: {share}": np.where(kept, shown, _dimmed(shown)),
        f"heads: {share}": _painted(shown, attention, grid, mass, colours),
    }
    for head in range(heads):
        columns[f"head {head + 1}"] = _framed(maps[:, head], colours[head])
    caption = (
        f"Attention of {whose} to the patches. Maps run from each one's own least "
        f"(dark) to its most (light). {share}: the fewest patches that hold this much of the "
        "attention to patches; of heads, in the colour of the head that looks there most."
    )
    fitting = max(4, _WIDTH // (size[1] + 4))
    return picture_rows(columns, caption, wrap=fitting)


def head_colours(heads: int) -> UInt8[np.ndarray, "heads 3"]:
    """A bright colour a head; hues a golden section apart, so that neighbours differ most."""
    rgb = [
        colorsys.hsv_to_rgb((0.02 + i * _GOLDEN) % 1, 0.75 - 0.3 * (i % 2), 1) for i in range(heads)
    ]
    return (np.array(rgb) * 255).round().astype(np.uint8)


def _stretched(attention: Tensor) -> Tensor:
    """Maps, each from its own least to its own most as 0..1; a flat one is 0."""
    low, high = attention.amin(-1, keepdim=True), attention.amax(-1, keepdim=True)
    return (attention - low) / (high - low).clamp(min=1e-12)


def _to_size(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Patches (b, k, n) as squares of an image: (b, k, height, width), each patch one value."""
    square = maps.unflatten(-1, grid).float()
    return F.interpolate(square, size=size, mode="nearest").numpy().astype(maps.numpy().dtype)


def _mix(images: np.ndarray, upon: np.ndarray, share: float) -> np.ndarray:
    """Two batches of pictures laid over each other, ``share`` of the second."""
    return (images * (1 - share) + upon * share).round().astype(np.uint8)


def _dimmed(images: np.ndarray) -> np.ndarray:
    """The pictures dark and in gray, under a blue, to set them apart from what is dark itself."""
    gray = images.mean(-1, keepdims=True).repeat(3, -1)
    return _mix(gray, np.array([30, 35, 80]), 0.75)


def _painted(
    images: np.ndarray, attention: Tensor, grid: tuple[int, int], mass: float, colours: np.ndarray
) -> np.ndarray:
    """Dimmed images; patches in ``mass`` of a head in that head's colour."""
    kept = mass_mask(attention, mass)
    # A head that gives little to patches at all counts as much as another.
    share = attention / attention.sum(-1, keepdim=True).clamp(min=1e-12)
    most = torch.where(kept, share, -1).argmax(1)
    size = (images.shape[1], images.shape[2])
    colour = np.moveaxis(
        _to_size(torch.from_numpy(colours)[most].movedim(-1, 1), grid, size), 1, -1
    )
    here = _to_size(kept.any(1, keepdim=True), grid, size)[:, 0, :, :, None]
    return np.where(here, _mix(images, colour, 0.7), _dimmed(images))


def _framed(pictures: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The pictures with a frame of 3 pixels."""
    framed = pictures.copy()
    for edge in (framed[:, :3], framed[:, -3:], framed[:, :, :3], framed[:, :, -3:]):
        edge[...] = colour
    return framed
