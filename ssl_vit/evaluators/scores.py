"""Scores of frozen features: k-NN and linear, from the same two feature sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ssl_vit.config import UserError, check
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.knn import accuracy, knn_classify
from ssl_vit.evaluators.linear import LinearProtocol, linear_probe

KS = (10, 20, 100, 200)


@dataclass(frozen=True)
class Score:
    """One line of a result: which features, the setting, accuracies in percent, and details."""

    features: str
    setting: str
    top1: float
    top5: float
    details: dict[str, Any]


def labelled(features: FeatureSet, spec: str) -> Tensor:
    """The labels, all of them known.

    Raises:
        UserError: some image has no label.
    """
    check(bool((features.labels >= 0).all()), f"{spec} has no labels; the score needs them")
    return features.labels


def knn_scores(train: FeatureSet, val: FeatureSet, ks: tuple[int, ...] = KS) -> list[Score]:
    """k-NN accuracy for every pooling and every k that the training set can fill."""
    bank_labels, labels = labelled(train, "the training set"), labelled(val, "the validation set")
    possible = tuple(k for k in ks if k <= len(bank_labels))
    if not possible:
        raise UserError(f"k is {ks}; the training set has {len(bank_labels)} images")
    scores = []
    for kind, bank in train.features.items():
        predicted = knn_classify(bank, bank_labels, val.features[kind], possible)
        for k in possible:
            top1, top5 = accuracy(predicted[k], labels), accuracy(predicted[k], labels, top=5)
            scores.append(Score(kind, f"k={k}", top1, top5, {"k": k, "temperature": 0.07}))
    return scores


def linear_scores(train: FeatureSet, val: FeatureSet, protocol: LinearProtocol) -> list[Score]:
    """Linear-probe accuracy for every pooling; the rate is chosen without the validation set."""
    labels, truth = labelled(train, "the training set"), labelled(val, "the validation set")
    check(len(labels) >= 20, f"the training set has {len(labels)} images; a probe needs 20")
    scores = []
    for kind, features in train.features.items():
        # Seeded inside; float32 throughout.
        result = linear_probe(features, labels, val.features[kind], protocol)
        held = {f"{rate:g}": round(value, 3) for rate, value in result.held_out_accuracy.items()}
        details = {"chosen_lr": result.chosen, "held_out_top1_by_lr": held}
        top1, top5 = accuracy(result.predicted, truth), accuracy(result.predicted, truth, top=5)
        scores.append(Score(kind, f"lr={result.chosen:g}", top1, top5, details))
    return scores
