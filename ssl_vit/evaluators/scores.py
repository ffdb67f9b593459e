"""Scores: predictions of evaluators, and their metrics with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.intervals import Groups, accuracy_interval, mean_precision_interval
from ssl_vit.evaluators.score import Score

_LARGEST_CONFUSION = 100


@dataclass
class Prediction:
    """Prediction of an evaluator for the validation images, with one setting.

    ``features`` and ``setting`` name it ("cls+mean", "k=20"). ``guesses``: (q, at most 5) int64
    classes, best first; or (q, L) float scores of independent labels, higher where more likely.
    ``details``: further information, as JSON.
    """

    features: str
    setting: str
    guesses: Tensor
    details: dict[str, Any]


def score_predictions(
    prediction: Prediction,
    truth: Tensor,
    classes: Sequence[str] | None,
    seed: int,
    groups: Int64[Tensor, " q"] | None = None,
) -> Score:
    """Score guesses against the truth: (q,) classes, or (q, L) labels, NaN where unknown.

    The interval is a percentile bootstrap over validation images, or over their ``groups``: it
    covers their sampling, not that of the training images.

    Raises:
        UserError: the truth is not known, or no label has both outcomes.
    """
    truth, guesses = labelled(truth, "the validation set").cpu(), prediction.guesses.cpu()
    assert len(guesses) == len(truth), f"{len(guesses)} guesses for {len(truth)} images"
    made = _score_classes if truth.ndim == 1 else _score_labels
    drawn = None if groups is None else groups.cpu().numpy()
    metrics, interval, per_class, confusion, more = made(guesses, truth, classes, seed, drawn)
    if drawn is not None:
        more["interval_of_groups"] = len(np.unique(drawn))
    details = prediction.details | more
    about = (prediction.features, prediction.setting)
    return Score(*about, metrics, interval, per_class, confusion, details)


_Scored = tuple[
    dict[str, float], tuple[float, float], dict[str, float], list[list[int]] | None, dict[str, Any]
]


def _score_classes(
    guesses: Tensor, truth: Tensor, classes: Sequence[str] | None, seed: int, groups: Groups
) -> _Scored:
    """Score classes: metrics, interval, accuracy of each class, confusion matrix."""
    correct = guesses[:, 0] == truth
    metrics = {"top1": accuracy(guesses, truth), "top5": accuracy(guesses, truth, top=5)}
    n = max(int(truth.max()), int(guesses[:, 0].max())) + 1
    n = max(n, len(classes or ()))
    there, right = (torch.bincount(t, minlength=n) for t in (truth, truth[correct]))
    shares = (100.0 * right.double() / there).tolist()
    per_class = {class_name(classes, c): shares[c] for c in range(n) if there[c]}
    confusion = None
    if n <= _LARGEST_CONFUSION:
        confusion = torch.bincount(truth * n + guesses[:, 0], minlength=n * n).view(n, n).tolist()
    return metrics, accuracy_interval(correct.numpy(), seed, groups), per_class, confusion, {}


def _score_labels(
    guesses: Tensor, truth: Tensor, classes: Sequence[str] | None, seed: int, groups: Groups
) -> _Scored:
    """Score independent labels: means over those with both outcomes; others are left out."""
    # Imported here: it would take a quarter of the start-up time of a command.
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, wanted = guesses.double().numpy(), truth.double().numpy()
    scored = np.flatnonzero((wanted == 1).any(0) & (wanted == 0).any(0))
    check(len(scored) > 0, "no label has both outcomes in the validation set; no score is possible")
    precision, area = [], []
    for label in scored:
        known = ~np.isnan(wanted[:, label])
        pair = wanted[known, label], scores[known, label]
        precision.append(100.0 * float(average_precision_score(*pair)))
        area.append(100.0 * float(roc_auc_score(*pair)))
    metrics = {"map": float(np.mean(precision)), "auroc": float(np.mean(area))}
    interval = mean_precision_interval(scores[:, scored], wanted[:, scored], seed, groups)
    names = [class_name(classes, label) for label in range(wanted.shape[1])]
    per_class = {names[label]: p for label, p in zip(scored, precision, strict=True)}
    left_out = [name for name in names if name not in per_class]
    return metrics, interval, per_class, None, {"left_out": left_out} if left_out else {}


def class_name(classes: Sequence[str] | None, number: int) -> str:
    """Name of a class, or its number where it has none."""
    return classes[number] if classes and number < len(classes) else str(number)


def accuracy(predicted: Int64[Tensor, "q top"], labels: Int64[Tensor, " q"], top: int = 1) -> float:
    """Top-k accuracy in percent: queries with their label among the first ``top`` guesses."""
    return 100.0 * float((predicted[:, :top] == labels[:, None]).any(1).double().mean())


def labelled(labels: Tensor, whose: str) -> Tensor:
    """Check that all classes, or at least some of several labels, are known; returns them.

    Raises:
        UserError: they are unknown.
    """
    if labels.ndim == 1:
        missing = int((labels < 0).sum())
        check(
            not missing,
            f"{whose} has no label for {missing:,} of {len(labels):,} images; the score needs all",
        )
    else:
        check(not bool(labels.isnan().all()), f"{whose} has no known label; the score needs some")
    return labels


def both_outcomes(targets: Tensor) -> Bool[Tensor, " l"]:
    """Labels of (n, L) that some images have and others have not."""
    return (targets == 1).any(0) & (targets == 0).any(0)


def check_labels(train: FeatureSet, val: FeatureSet, classes: Sequence[str] | None) -> None:
    """Check that the labels of training and validation sets allow training and scoring.

    Raises:
        UserError: labels are missing; training has one class; validation has one that training
            lacks; one class an image here, several labels there.
    """
    kinds = {1: "one class an image", 2: "several labels an image"}
    ours, theirs = train.labels, val.labels
    check(
        ours.ndim == theirs.ndim,
        f"the training set has {kinds[ours.ndim]}, the validation set {kinds[theirs.ndim]}; "
        "both must be of one kind",
    )
    labelled(ours, "the training set")
    labelled(theirs, "the validation set")
    if ours.ndim == 2:
        n, m = ours.shape[1], theirs.shape[1]
        check(n == m, f"the training set has {n} labels, the validation set {m}")
        useful, scored = (bool(both_outcomes(labels).any()) for labels in (ours, theirs))
        check(useful, "no label has both outcomes in the training set; nothing to learn")
        check(scored, "no label has both outcomes in the validation set; no score is possible")
        return
    there = set(ours.unique().tolist())
    one = class_name(classes, min(there))
    check(len(there) > 1, f"all training images are of class {one!r}; at least two are needed")
    strange = sorted(set(theirs.unique().tolist()) - there)
    names = ", ".join(repr(class_name(classes, c)) for c in strange[:3])
    more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
    check(not strange, f"validation has images of {names}{more}; training has none of them")
