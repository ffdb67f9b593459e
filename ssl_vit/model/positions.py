"""Position tables: resampling to another grid of patches, as each family of networks does it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.errors import check


def resampled(
    table: Float[Tensor, "b n d"], old: tuple[int, int], new: tuple[int, int], kind: str
) -> Float[Tensor, "b m d"]:
    """Positions of the patches of a grid ``old`` (rows, columns), bicubically, for a grid ``new``.

    Args:
        kind: ``timm``: to the new size, antialiased (timm, DINOv2 with registers). ``mae``: to the
            new size, not antialiased (fine-tuning of the official MAE, Hugging Face's ViT).
            ``dino``: by the factor (new + 0.1) / old, not antialiased (official DINO, and DINOv2
            without registers, whose code adds 0.1 against rounding errors: the factor, not the
            size, decides where the table is read).
    """
    if new == old:
        return table
    image = table.unflatten(1, old).permute(0, 3, 1, 2)
    image = image.to(torch.promote_types(table.dtype, torch.float32))
    if kind == "dino":
        factor = [(n + 0.1) / o for n, o in zip(new, old, strict=True)]
        image = F.interpolate(image, scale_factor=factor, mode="bicubic")
    else:
        image = F.interpolate(image, list(new), mode="bicubic", antialias=kind == "timm")
    return image.flatten(2).transpose(1, 2).to(table.dtype)


def sincos_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "n d"]:
    """Fixed two-dimensional sine-cosine positions (He et al. 2022, after Vaswani et al. 2017).

    The first half of the features encodes the column, the second the row; each half is sines, then
    cosines, of the coordinate times 10000^(-i / (width / 4)). Computed in float64.
    """
    check(width % 4 == 0, f"sine-cosine positions need a width divisible by 4, not {width}")
    rows, cols = grid
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(cols)[:, None] * omega
    col = torch.arange(cols, dtype=torch.float64).repeat(rows)[:, None] * omega
    return torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], dim=1).float()
