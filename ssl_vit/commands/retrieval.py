"""Retrieval command: from options to scores, card and picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ssl_vit.commands.evaluating import Evaluation
from ssl_vit.commands.probes import Result
from ssl_vit.commands.retrieval_options import RetrievalConfig
from ssl_vit.common.errors import check
from ssl_vit.data.positives import read_positives
from ssl_vit.evaluators.cache import labels_sha256
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.intervals import mean_interval
from ssl_vit.evaluators.options import FEATURES
from ssl_vit.evaluators.ranking import (
    Ranked,
    Relevant,
    by_labels,
    by_pairs,
    first_ranked,
    itself,
    rank_queries,
)
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.scores import class_name, labelled
from ssl_vit.evaluators.whitening import Whitening
from ssl_vit.pictures.boundaries import evenly
from ssl_vit.pictures.neighbours import neighbours_panel
from ssl_vit.pictures.thumbnails import thumbnails

_SHOWN, _FIRST, _PIXELS = 8, 5, 112

Parts = tuple[list[Tensor], list[Tensor], dict[str, Any]]
"""A feature of the gallery and of the queries, and details of it."""


@dataclass(frozen=True)
class Search:
    """Search: what is asked, and what of the gallery is right, and not ranked, for each query."""

    by: Evaluation
    config: RetrievalConfig
    queries: FeatureSet
    gallery: FeatureSet
    relevant: Relevant
    excluded: Relevant | None
    right: str
    """Right answers, in words."""


def retrieval(config: RetrievalConfig) -> Result:
    """Retrieval scores for every feature, and a picture of the best one's first answers."""
    by = Evaluation(config, needs_val=False, plain=True, labelled=not config.positives)
    gallery = by.features("train")
    queries = by.features("val") if "val" in by.sources else gallery
    told: dict[str, Any] = {}
    if config.positives:
        pairs = _pairs(Path(config.positives).expanduser(), by, queries, gallery)
        told = {"pairs": len(pairs[0]), "sha256": labels_sha256(torch.stack(pairs))}
        # Queries without a positive are not ranked.
        asked, numbers = pairs[0].unique(return_inverse=True)
        relevant = by_pairs(numbers, pairs[1], len(gallery.index))
        rows, right = queries.take(asked), "a positive of the query"
    else:
        relevant, rows = _same_label(queries, gallery), queries
        asked = torch.arange(len(queries.index))
        right = "of the query's class" if rows.labels.ndim == 1 else "with a label of the query's"
    excluded = _excluded(queries, gallery, asked, grouped=not config.positives)
    search = Search(by, config, rows, gallery, relevant, excluded, right)
    scores, best = [], None
    for name in by.names:
        found = _parts(name, search)
        score, usable = _score(name, search, found)
        scores.append(score)
        if best is None or score.value > best[0]:  # its parts are for the picture, too
            best = score.value, (name, search, found, usable)
    assert best is not None
    how = "validation set against training set" if "val" in by.sources else "leave-one-out"
    about = {"judged_on": how, "whitening": config.whitening, "positives": told or "labels"}
    card, picture = by.card("retrieval", **about), _picture(*best[1])
    return scores, card, by.out("retrieval"), {"nearest": picture}


def _same_label(queries: FeatureSet, gallery: FeatureSet) -> Relevant:
    """Positives by labels, which must be of one kind."""
    kinds = queries.labels.ndim == gallery.labels.ndim
    check(kinds, "--data.train and --data.val: one has one class an image, the other several")
    labelled(queries.labels, "the validation set")
    labelled(gallery.labels, "the training set")
    return by_labels(queries.labels, gallery.labels)


def _pairs(
    path: Path, by: Evaluation, queries: FeatureSet, gallery: FeatureSet
) -> tuple[Tensor, Tensor]:
    """Rows of the pairs of a CSV whose images can be read."""
    train = by.sources["train"]
    val = by.sources.get("val", train)
    both = []
    for images, found, source in zip(
        read_positives(path, val, train), (queries, gallery), (val, train), strict=True
    ):
        row_of = np.full(len(source), -1, dtype=np.int64)
        row_of[found.index.numpy()] = np.arange(len(found.index))
        both.append(torch.from_numpy(row_of[images]))
    usable = (both[0] >= 0) & (both[1] >= 0)
    if queries is gallery:  # an image is no positive of its own
        usable &= both[0] != both[1]
    check(bool(usable.any()), f"--positives {path}: no pair of two images that can be read")
    return both[0][usable], both[1][usable]


def _excluded(
    queries: FeatureSet, gallery: FeatureSet, asked: Tensor, grouped: bool
) -> Relevant | None:
    """Rows that are not ranked: where images are searched among themselves, each itself or its
    group."""
    if queries is not gallery:
        return None
    own = itself(gallery.groups if grouped else None, len(gallery.index))
    return lambda rows: own(asked[rows])


def _parts(name: str, search: Search) -> Parts:
    """A feature of the gallery and of the queries, whitened if asked for; and what to say of it."""
    bank, asked = (
        [found.parts[part] for part in FEATURES[name]] for found in (search.gallery, search.queries)
    )
    if not search.config.whitening:
        return bank, asked, {}
    flat = Whitening.of(bank)
    return [flat(bank)], [flat(asked)], {"shrinkage": flat.shrinkage}


def _score(name: str, search: Search, found: Parts) -> tuple[Score, Int64[Tensor, " u"]]:
    """Score of one feature, and the queries that have a positive."""
    by, queries, gallery = search.by, search.queries, search.gallery
    config, (bank, asked, details) = search.config, found
    ranked = rank_queries(bank, asked, search.relevant, by.device, search.excluded)
    usable = ranked.positives > 0
    check(bool(usable.any()), "no query has a positive among the images that are searched")
    details |= {"queries": int(usable.sum()), "gallery": len(gallery.index)}
    details |= {"queries_without_positive": int((~usable).sum())}
    groups = None if queries.groups is None else queries.groups[usable].numpy()
    if groups is not None:
        details["interval_of_groups"] = len(np.unique(groups))
    interval = mean_interval(100 * ranked.precision[usable].numpy(), config.seed, groups)
    setting = "whitened cosine" if config.whitening else "cosine"
    by_class = {} if config.positives else _per_class(ranked, queries.labels, by.classes)
    score = Score(name, setting, ranked.metrics(), interval, by_class, None, details)
    return score, usable.nonzero()[:, 0]


def _picture(
    name: str, search: Search, found: Parts, usable: Int64[Tensor, " u"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Neighbours panel of some queries, evenly spread: what is ranked first by a feature."""
    by, queries, gallery = search.by, search.queries, search.gallery
    bank, asked, _ = found
    rows = usable[evenly(len(usable), _SHOWN)]
    places, cosines = first_ranked(bank, asked, rows, _FIRST, by.device, search.excluded)
    right = search.relevant(rows).cpu().gather(1, places)
    train = by.sources["train"]
    val = by.sources.get("val", train)
    images = thumbnails(val, queries.index[rows].tolist(), by.backbone.view, _PIXELS)
    first = gallery.index[places.flatten()].tolist()
    shown = thumbnails(train, first, by.backbone.view, _PIXELS)
    about = f"Queries, and the images ranked first of {len(gallery.index):,} by {name} features."
    shown = shown.reshape(*places.shape, *shown.shape[1:])
    return neighbours_panel(images, shown, cosines, right, about, search.right)


def _per_class(ranked: Ranked, labels: Tensor, classes: tuple[str, ...] | None) -> dict[str, float]:
    """Mean average precision over the queries of each class, or with each label."""
    usable = ranked.positives > 0
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    found = {}
    for number in range(count):
        own = labels == number if labels.ndim == 1 else labels[:, number] == 1
        if bool((own & usable).any()):
            mean = float(ranked.precision[own & usable].mean())
            found[class_name(classes, number)] = 100.0 * mean
    return found
