"""Linear heads on frozen features: many trained together, each with its own learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.distributed import all_reduce_mean, rank_and_world
from ssl_vit.common.seeds import fold
from ssl_vit.common.transfer import without_wait

SIGMA = 0.01
"""Standard deviation of a head's initial weights; the same in every published protocol."""


_ROWS = 1 << 14


class FeatureNorm(nn.Module):
    """Feature norm: BatchNorm without affine parameters (eps 1e-6), as before MAE's linear head.

    In training mode the statistics are those of the batch over all processes, and the running
    estimates are updated (momentum .1, unbiased variance); otherwise the stored ones are used.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    @classmethod
    def of(cls, *parts: Float[Tensor, "n _"]) -> FeatureNorm:
        """Norm with the exact statistics of a feature, given in parts; fixed."""
        norm = cls(sum(part.shape[1] for part in parts)).eval()
        norm.mean = torch.cat([part.mean(0) for part in parts])
        # A single image has no variance: it is mapped to 0.
        one = len(parts[0]) == 1
        norm.variance = torch.cat([part.var(0, correction=not one) for part in parts])
        return norm

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Standardised features: mean 0, variance 1."""
        mean, variance = self.mean, self.variance
        if self.training:
            # Processes have equally large parts of a batch, so means over processes are exact.
            mean = all_reduce_mean(features.mean(0))
            variance = all_reduce_mean((features - mean).square().mean(0))
            n = len(features) * rank_and_world()[1]
            self.mean.lerp_(mean, 0.1)
            self.variance.lerp_(variance * (n / max(1, n - 1)), 0.1)
        return (features - mean) * (variance + 1e-6).rsqrt()


class LinearHeads(nn.Module):
    """Linear heads: ``g`` of them on one feature, with the same initial weights.

    Args:
        width, outputs: number of input features and of output classes (or labels).
        rates: learning rate of each head, for 256 images.
        key: seed of the initial weights, which are normal with sigma .01; biases are 0.
        norm: applied to the features first, if given.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        rates: tuple[float, ...],
        key: int,
        norm: FeatureNorm | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(key)
        weight = SIGMA * torch.randn(outputs, width, generator=generator)
        self.rates = rates
        self.norm = norm
        self.weight = nn.Parameter(weight.expand(len(rates), -1, -1).clone())
        self.bias = nn.Parameter(torch.zeros(len(rates), outputs))

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b g c"]:
        """Logits of all heads, in one matrix product."""
        if self.norm is not None:
            features = self.norm(features)
        logits = F.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return logits.unflatten(1, self.bias.shape)

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n d"], rate: float) -> Float[Tensor, "n c"]:
        """Logits of the head of one learning rate, with the norm's stored statistics."""
        i = self.rates.index(rate)
        if self.norm is not None:
            self.norm.eval()
            features = self.norm(features)
        return F.linear(features, self.weight[i], self.bias[i])


def heads_of(
    points: Sequence[tuple[str, float]],
    widths: Mapping[str, int],
    outputs: int,
    seed: int,
    norm: Callable[[str], FeatureNorm | None] = lambda name: None,
) -> dict[str, LinearHeads]:
    """Make the heads of (feature, learning rate) points, stacked by feature, in the given order.

    Initial weights depend only on the seed and the feature, not on the other heads.
    """
    made = {}
    for name in dict.fromkeys(name for name, _ in points):
        rates = tuple(rate for of, rate in points if of == name)
        key = fold(seed, *name.encode())
        made[name] = LinearHeads(widths[name], outputs, rates, key, norm(name))
    return made


def preconditioner(
    features: Sequence[Float[Tensor, "n _"]], norm: FeatureNorm, power: float
) -> Float[Tensor, "d d"]:
    """Preconditioner (C + 1e-4)^-power, C the covariance of at most 16,384 standardised features.

    Frozen features are so correlated (variances along principal axes from 250 to 0) that SGD learns
    hardly anything in most directions. Multiplying weight gradients by this is SGD in coordinates
    whitened by half that power (full whitening: 1). ``features``: in parts, anywhere; the result is
    where the norm is.
    """
    every = max(1, len(features[0]) // _ROWS)
    some = torch.cat([part[::every] for part in features], dim=1)
    points = norm(some.to(norm.mean.device))
    covariance = points.T @ points / len(points)
    # Apple's GPUs have no float64.
    covariance = covariance.cpu() if covariance.device.type == "mps" else covariance
    values, axes = torch.linalg.eigh(covariance.double())
    flat = (axes * (values.clamp(min=0) + 1e-4) ** -power) @ axes.T
    return flat.float().to(points.device)


def linear_heads_loss(logits: Float[Tensor, "b g c"], targets: Tensor) -> Float[Tensor, ""]:
    """Sum of the heads' losses: each head's gradient is that of its own loss.

    ``targets``: (b,) int64 classes: cross-entropy, mean over images. (b, c) float labels, 1, 0 or
    NaN where unknown: binary cross-entropy of each label, sum of the known ones divided by b, so
    that the learning rate per label does not depend on their number.
    """
    b, g, _ = logits.shape
    if targets.ndim == 1:
        repeated = targets[:, None].expand(-1, g).flatten()
        return F.cross_entropy(logits.flatten(0, 1), repeated, reduction="sum") / b
    known = ~targets[:, None].isnan()
    truth = targets[:, None].nan_to_num().expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(logits, truth, known.float(), reduction="sum")
    return loss / b


class HeadOptimizer:
    """Head optimizer: SGD with momentum, or LARS, for the heads of several features together.

    SGD: v <- momentum v + g, p <- p - rate v. LARS (You et al. 2017, algorithm 1, as in MAE's
    linear probe): the gradient of a weight matrix is first scaled to ``trust`` times the norm of
    the weights over its own; biases are not scaled. Each head is treated separately.

    Args:
        trust: LARS' trust coefficient; 0 for SGD.
        precondition: for each feature, the matrix that multiplies its weight gradients.
        shared: whether each process has a part of every batch; gradients are then averaged over
            processes. Otherwise each process trains alone.
    """

    def __init__(
        self,
        heads: Mapping[str, LinearHeads],
        momentum: float = 0.9,
        trust: float = 0.0,
        precondition: Mapping[str, Tensor] | None = None,
        shared: bool = False,
    ) -> None:
        self.heads, self.momentum, self.trust, self.shared = heads, momentum, trust, shared
        self.precondition = precondition or {}
        self.velocity: dict[Tensor, Tensor] = {}

    def step(self, features: Mapping[str, Tensor], targets: Tensor, factor: float) -> None:
        """Update all heads, with learning rates multiplied by ``factor``.

        A diverging head does not affect the others.
        """
        for name, heads in self.heads.items():
            loss = linear_heads_loss(heads(features[name]), targets)
            parameters = (heads.weight, heads.bias)
            rates = without_wait(factor * torch.tensor(heads.rates), loss.device)
            weight, bias = torch.autograd.grad(loss, parameters)
            if name in self.precondition:
                weight = weight @ self.precondition[name]
            for parameter, gradient in zip(parameters, (weight, bias), strict=True):
                gradient = all_reduce_mean(gradient) if self.shared else gradient
                self._update(parameter, gradient, rates)

    @torch.no_grad()
    def _update(self, parameter: Tensor, gradient: Tensor, rates: Float[Tensor, " g"]) -> None:
        if self.trust and parameter.ndim == 3:
            weights, gradients = (p.flatten(1).norm(dim=1) for p in (parameter, gradient))
            scale = self.trust * weights / gradients
            usable = (weights > 0) & (gradients > 0)
            gradient = gradient * torch.where(usable, scale, 1.0)[:, None, None]
        velocity = self.velocity.get(parameter)
        if velocity is None:
            velocity = self.velocity[parameter] = torch.zeros_like(parameter)
        velocity.mul_(self.momentum).add_(gradient)
        parameter.sub_(rates.view(-1, *[1] * (parameter.ndim - 1)) * velocity)
