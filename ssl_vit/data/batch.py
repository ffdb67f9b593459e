"""Batch of images: views, and what became of images that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ssl_vit.common.task import Views


@dataclass
class Batch:
    """Batch from a worker: views, and unreadable images (index -> reason).

    ``empty``: tiles without data that were replaced. ``unkept``: why the worker's cache takes no
    more images; empty: it does.
    """

    views: Views
    bad: dict[int, str] = field(default_factory=dict)
    empty: set[int] = field(default_factory=set, kw_only=True)
    unkept: str = field(default="", kw_only=True)

    def pin_memory(self) -> Batch:
        """Hook of torch's loader: pinned memory, so that copies to a GPU need not wait."""
        return replace(self, views=self.views.pin_memory())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.views.nbytes


def stack(crops: list[Tensor]) -> Tensor:
    """One batch; where 8-bit images meet deeper ones, all in the deeper ones' scale of 0..1.

    Its memory is laid out pixel by pixel, as crops of colour images are: nothing is transposed.
    """
    if len({c.dtype for c in crops}) > 1:
        crops = [c.float() / 255 if c.dtype == torch.uint8 else c for c in crops]
    return torch.stack([c.permute(1, 2, 0) for c in crops]).permute(0, 3, 1, 2)
