"""Linear heads on frozen features: many trained side by side, each with its own learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.distributed import all_reduce_mean, rank_and_world
from ssl_vit.common.seeds import fold

SIGMA = 0.01
"""Standard deviation of a head's initial weights; the same in every published protocol."""


_ROWS = 1 << 14


class FeatureNorm(nn.Module):
    """BatchNorm without affine parameters (eps 1e-6), as before MAE's linear head.

    In training mode the statistics are those of the batch over all processes, and a running
    estimate follows them (momentum .1, unbiased variance); otherwise those stored are used.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> FeatureNorm:
        """The norm whose statistics are exactly those of some features, and stay so."""
        norm = cls(features.shape[1]).eval()
        # One image has no variance: it is brought to 0.
        norm.mean, norm.variance = features.mean(0), features.var(0, correction=len(features) > 1)
        return norm

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Features with mean 0 and variance 1."""
        mean, variance = self.mean, self.variance
        if self.training:
            # Shares of a batch are equally large, so means over processes are those of the batch.
            mean = all_reduce_mean(features.mean(0))
            variance = all_reduce_mean((features - mean).square().mean(0))
            n = len(features) * rank_and_world()[1]
            self.mean.lerp_(mean, 0.1)
            self.variance.lerp_(variance * (n / max(1, n - 1)), 0.1)
        return (features - mean) * (variance + 1e-6).rsqrt()


class LinearHeads(nn.Module):
    """``g`` linear heads over one feature, all from the same initial weights.

    Args:
        width, outputs: features in, classes (or labels) out.
        rates: the learning rate of each head, for 256 images.
        key: the initial weights follow from it; they are normal with sigma .01, biases 0.
        norm: what features go through first, if anything.
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
        """Logits of every head, in one matrix product."""
        if self.norm is not None:
            features = self.norm(features)
        logits = F.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return logits.unflatten(1, self.bias.shape)

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n d"], rate: float) -> Float[Tensor, "n c"]:
        """Logits of the head of one rate, by its stored statistics."""
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
    """The heads of (feature, learning rate) points, by feature, in the order given.

    Initial weights follow from the seed and the feature, whatever else is trained beside it.
    """
    made = {}
    for name in dict.fromkeys(name for name, _ in points):
        rates = tuple(rate for of, rate in points if of == name)
        key = fold(seed, *name.encode())
        made[name] = LinearHeads(widths[name], outputs, rates, key, norm(name))
    return made


def preconditioner(
    features: Float[Tensor, "n d"], norm: FeatureNorm, power: float
) -> Float[Tensor, "d d"]:
    """(C + 1e-4)^-power, C the covariance of standardised features; of 16,384 of them if more.

    Frozen features are so correlated (variances along principal axes from 250 to 0) that SGD leaves
    most directions unlearned. Gradients of weights times this are SGD in coordinates whitened by
    half that power (whole whitening: 1).
    """
    points = norm(features[:: max(1, len(features) // _ROWS)])
    covariance = points.T @ points / len(points)
    # Apple's GPUs have no float64.
    covariance = covariance.cpu() if covariance.device.type == "mps" else covariance
    values, axes = torch.linalg.eigh(covariance.double())
    flat = (axes * (values.clamp(min=0) + 1e-4) ** -power) @ axes.T
    return flat.float().to(features.device)


def linear_heads_loss(logits: Float[Tensor, "b g c"], targets: Tensor) -> Float[Tensor, ""]:
    """Sum over heads of each one's loss, so that each head's gradient is that of its own alone.

    ``targets``: (b,) int64 classes: cross-entropy, mean over images. (b, c) float labels, 1, 0 or
    NaN where unknown: binary cross-entropy of each label, sum of the known ones divided by b, so
    that labels do not slow each other.
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
    """SGD with momentum, or LARS, for the heads of several features on the same images.

    SGD: v <- momentum v + g, p <- p - rate v. LARS (You et al. 2017, algorithm 1, as in MAE's
    linear probe): the gradient of a weight matrix is first scaled to ``trust`` times the norm of
    the weights over its own; biases are left alone. Each head is one of its own in all of this.

    Args:
        trust: LARS' trust coefficient; 0 for SGD.
        precondition: for each feature, what gradients of its weights are multiplied by.
        shared: whether each process has a share of every batch; gradients are then averaged over
            them. Otherwise each trains alone.
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
        """One update of all heads, whose rates are multiplied by ``factor``.

        A head that diverges hurts no other.
        """
        for name, heads in self.heads.items():
            loss = linear_heads_loss(heads(features[name]), targets)
            parameters = (heads.weight, heads.bias)
            rates = factor * torch.tensor(heads.rates, device=loss.device)
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
