"""Quick scores: k-NN and linear probe in one call, as pretraining reports them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.knn import knn_predictions
from ssl_vit.evaluators.linear import LinearProtocol, linear_probe
from ssl_vit.evaluators.options import FEATURES, KS
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.scores import labelled, score_predictions

_CPU = torch.device("cpu")


def plain_features(features: FeatureSet) -> tuple[str, ...]:
    """Names of features that consist of one part."""
    return tuple(name for name in features.parts if FEATURES.get(name) == (name,))


def knn_scores(
    train: FeatureSet,
    val: FeatureSet,
    ks: Sequence[int] = KS,
    features: tuple[str, ...] = (),
    classes: Sequence[str] | None = None,
    device: torch.device = _CPU,
) -> list[Score]:
    """k-NN scores for each feature (empty: the plain ones) and each possible k.

    In one process, on ``device``; the sets are on the CPU. ``classes``: their names, if any.
    """
    truth = labelled(val.labels, "the validation set")
    names = features or plain_features(train)
    found = knn_predictions(train, val, ks, names, device, shared=False)
    return [score_predictions(p, truth, classes, seed=0, groups=val.groups) for p in found]


def linear_scores(
    train: FeatureSet,
    val: FeatureSet,
    protocol: LinearProtocol,
    classes: Sequence[str] | None = None,
    device: torch.device = _CPU,
) -> list[Score]:
    """Linear probe score, of the head selected without the validation set; sets are on the CPU."""
    labelled(train.labels, "the training set")
    truth = labelled(val.labels, "the validation set")
    return [
        score_predictions(p, truth, classes, protocol.seed, val.groups)
        for p in linear_probe(train, val, protocol, device=device)
    ]
