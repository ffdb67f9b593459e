"""Made-up frozen features, for tests of what learns from them."""

import math

import torch

from ssl_vit.evaluators.features import FeatureSet


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def feature_set(labels: torch.Tensor, **parts: torch.Tensor) -> FeatureSet:
    return FeatureSet(parts, labels, 0, torch.arange(len(labels)))


def blobs(n: int, classes: int, width: int, noise: float, seed: int) -> FeatureSet:
    """Points around one centre a class, as ``mean``; the centres are always the same."""
    labels = torch.arange(n) % classes
    centres = normal(classes, width, seed=1000)
    return feature_set(labels, mean=centres[labels] + noise * normal(n, width, seed=seed))


def tagged(n: int, labels: int, seed: int, unknown: float = 0.2) -> FeatureSet:
    """Images with several labels each, each the side of a direction; some unknown."""
    points = normal(n, 12, seed=seed)
    truth = (points @ normal(12, labels, seed=7) > 0.5).float()
    hidden = torch.rand(n, labels, generator=torch.Generator().manual_seed(seed)) < unknown
    return feature_set(truth.masked_fill(hidden, math.nan), mean=points)


def top1(prediction, labels: torch.Tensor) -> float:
    return 100.0 * float((prediction.guesses[:, 0] == labels).double().mean())
