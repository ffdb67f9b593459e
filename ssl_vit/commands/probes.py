"""Probe commands: k-NN, linear and segmentation evaluation, from options to scores and card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_vit.commands.eval_options import (
    KnnConfig,
    LinearConfig,
)
from ssl_vit.commands.evaluating import Evaluation
from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.order import permute
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.knn import knn_predictions, others
from ssl_vit.evaluators.linear import LinearProtocol, linear_probe
from ssl_vit.evaluators.logreg import LogregProtocol, logreg_probe
from ssl_vit.evaluators.lowshot import over_seeds, subsets
from ssl_vit.evaluators.online import online_probe, source_targets
from ssl_vit.evaluators.published import ONLINE, OnlineProtocol, online_protocol
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.scores import Prediction, check_labels, score_predictions

log = logging.getLogger("ssl_vit")
_CHOICE_IMAGES = 5000
Pictures = dict[str, np.ndarray | Callable[[], Sequence[Path]]]
"""Files beside a result: by name, a picture (height, width, 3) uint8, or a function that writes
files and returns their paths."""
Result = (
    tuple[list[Score], dict[str, Any], Path] | tuple[list[Score], dict[str, Any], Path, Pictures]
)
"""Result: scores, protocol card, the file both are written to, and pictures, if there are any."""


def knn(config: KnnConfig) -> Result:
    """k-NN scores for every feature and every k."""
    evaluation = Evaluation(config, needs_val=False, plain=True)
    train = evaluation.features("train")
    val = evaluation.features("val") if "val" in evaluation.sources else None
    truth = train if val is None else val
    check_labels(train, truth, evaluation.classes)
    found = knn_predictions(train, val, config.k, evaluation.names, evaluation.device)
    how = "leave-one-out" if val is None else "validation set"
    card = evaluation.card("knn", judged_on=how)
    return scores_of(found, truth, evaluation), card, evaluation.out("knn")


def linear(config: LinearConfig) -> Result:
    """Linear probe scores: one, or one for each low-shot amount."""
    evaluation = Evaluation(config)
    train = evaluation.sources["train"]
    check(
        train.targets is None or not config.per_class,
        f"--per-class is {' '.join(map(str, config.per_class))}; images of {train.spec} have "
        "several labels and no single class: give a share of all images, as --fraction 0.25",
    )
    if "held_out" in evaluation.sources:
        source_targets(evaluation.sources["held_out"], "the held-out set")
    if config.protocol in ONLINE:
        sizes = config.epochs, config.probe_batch, config.features
        published = online_protocol(config.protocol, evaluation.backbone, config.seed, *sizes)
        scores = learn_online(evaluation, published)
        used: Any = published
    else:
        own: dict[str, Any] = {"features": config.features} if config.features else {}
        own["seed"] = config.seed
        if config.protocol == "fast":
            own |= {"epochs": config.epochs, "least_steps": 1} if config.epochs else {}
            own |= {"batch_size": config.probe_batch} if config.probe_batch else {}
        used = LinearProtocol(**own) if config.protocol == "fast" else LogregProtocol(**own)
        scores = learn_cached(evaluation, used)
    card = evaluation.card("linear", protocol={"name": used.name, **asdict(used)})
    few = "-low-shot" if config.amounts else ""
    name = "linear" if config.protocol == "fast" else f"linear-{config.protocol}"
    return scores, card, evaluation.out(name + few)


def learn_online(by: Evaluation, protocol: OnlineProtocol) -> list[Score]:
    """Linear probe scores by a published protocol, which trains on augmented images."""
    train = by.sources["train"]
    val = by.features("val")
    known = FeatureSet({}, source_targets(train), 0, torch.arange(len(train)))
    check_labels(known, val, by.classes)
    held_out = by.sources.get("held_out")
    found = online_probe(by.backbone, train, val, protocol, by.machine, by.extract, held_out)
    return scores_of(found, val, by)


def learn_cached(by: Evaluation, protocol: LinearProtocol | LogregProtocol) -> list[Score]:
    """Linear probe scores by a protocol on cached features, from all training images or few."""
    config = by.config
    assert isinstance(config, LinearConfig)
    train, val = by.features("train"), by.features("val")
    check_labels(train, val, by.classes)
    held_out = by.features("held_out") if "held_out" in by.sources else None

    def learn(rows: torch.Tensor | None, seed: int) -> list[Score]:
        some, seeded = train if rows is None else train.take(rows), replace(protocol, seed=seed)
        # Features stay in the host's memory.
        if isinstance(seeded, LogregProtocol):
            found = logreg_probe(some, val, seeded, held_out)
        else:
            found = linear_probe(some, val, seeded, held_out, by.device)
        return scores_of(found, val, by)

    if not config.amounts:
        return learn(None, config.seed)
    scores = []
    for per_class, share in config.amounts:
        seeds = [fold(config.seed, repeat) for repeat in range(config.repeats)]
        picks = [subsets(train.labels, per_class, share, seed, by.classes) for seed in seeds]
        several = [learn(rows, seed)[0] for rows, seed in zip(picks, seeds, strict=True)]
        amount = f"{per_class} a class" if share is None else f"{100 * share:g} %"
        scores.append(replace(over_seeds(several), setting=amount))
    return scores


def scores_of(found: Sequence[Prediction], truth: FeatureSet, by: Evaluation) -> list[Score]:
    """Scores of predictions against the true labels of these images."""
    labels, groups = truth.labels, truth.groups
    return [score_predictions(p, labels, by.classes, by.config.seed, groups) for p in found]


def best_pooling(evaluation: Evaluation) -> str:
    """Best pooling by leave-one-out k-NN on 5,000 training images (k = 20, or all there are).

    The choice between [CLS] and the mean patch thus needs no validation image.
    """
    poolings = evaluation.backbone.poolings
    if len(poolings) == 1:
        return poolings[0]
    train = evaluation.features("train")
    picks = np.arange(min(_CHOICE_IMAGES, len(train.index)), dtype=np.int64)
    rows = permute(picks, len(train.index), fold(evaluation.config.seed, _CHOICE_IMAGES))
    some = train.take(torch.from_numpy(rows))
    k = max(1, min(20, others(some)))
    found = knn_predictions(some, None, (k,), poolings, evaluation.device)
    scores = scores_of(found, some, evaluation)
    return max(scores, key=lambda score: score.value).features
