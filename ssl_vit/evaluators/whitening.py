"""Whitening of features: principal axes scaled to equal variance, as retrieval uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_vit.evaluators.knn import unit

_ROWS = 1 << 14
_CHUNK = 1 << 16
_FLOOR, _LEAST = 1e-8, 1e-12
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Whitening:
    """PCA whitening of L2-normalised features (Jégou and Chum 2012): ``(x - mean) @ matrix`` has
    equal variance along all axes, over the images that it was made from.

    ``shrinkage``: share of the covariance that is replaced by a multiple of the identity of the
    same trace (Ledoit and Wolf 2004): near 1 where images are fewer than channels.
    """

    mean: Float[Tensor, " d"]
    matrix: Float[Tensor, "d d"]
    shrinkage: float

    @classmethod
    def of(cls, features: Sequence[Float[Tensor, "n _"]]) -> Whitening:
        """Whitening by the covariance of at most 16,384 of the images, evenly spread."""
        # Imported here: it would take a quarter of the start-up time of a command.
        from sklearn.covariance import ledoit_wolf

        every = max(1, -(-len(features[0]) // _ROWS))
        rows = unit([part[::every] for part in features], 0, _ROWS, _CPU).double()
        covariance, shrinkage = ledoit_wolf(rows.numpy())
        values, axes = torch.linalg.eigh(torch.from_numpy(covariance))
        # Of images that are all alike nothing is left to scale.
        floor = max(_FLOOR * float(values[-1]), _LEAST)
        matrix = axes * values.clamp(min=floor) ** -0.5
        return cls(rows.mean(0).float(), matrix.float(), float(shrinkage))

    def __call__(self, features: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n d"]:
        """Whitened features of images, given in parts."""
        starts = range(0, len(features[0]), _CHUNK)
        rows = (unit(features, start, start + _CHUNK, _CPU) for start in starts)
        return torch.cat([(part - self.mean) @ self.matrix for part in rows])
