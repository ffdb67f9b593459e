"""The head of self-distillation: an MLP, a unit sphere, and prototypes on it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.task import at_least_fp32


class PrototypeLayer(nn.Module):
    """A weight-normalised linear layer without bias (Salimans and Kingma 2016)."""

    def __init__(self, width: int, outputs: int, fixed_gain: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(width, outputs, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(outputs, 1), requires_grad=not fixed_gain)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Inner products with the rows of v, each scaled to the length g.

        The product is in the precision of autocast, if that is on; the result in float32 at least.
        """
        # The outputs are scaled, not the weights: another tensor of their size is never made.
        scale = self.weight_g / self.weight_v.norm(dim=1, keepdim=True)
        return at_least_fp32(F.linear(x, self.weight_v)) * scale.T


class ProjectionHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, weight-normalised prototypes (Caron et al. 2021,
    section 3.2).

    Args:
        widths: features before and after each linear layer of the MLP; the last is the bottleneck.
        prototypes: outputs.
        fixed_gain: every prototype has length 1, and is not trained in length.
    """

    def __init__(self, widths: Sequence[int], prototypes: int, fixed_gain: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.GELU()] if i else []
            layers.append(nn.Linear(before, after))
        self.mlp = nn.Sequential(*layers)
        self.last_layer = PrototypeLayer(widths[-1], prototypes, fixed_gain)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Inner products with the prototypes, one row an image."""
        return self.last_layer(F.normalize(self.mlp(features), dim=-1))
