"""Segmentation probe: classes of pixels from an encoder's frozen patch tokens.

The protocol is that of Oquab et al. 2023 (section 7.4, "linear"): BatchNorm and one linear layer
on each patch token give class logits at the patches' resolution, which bilinear interpolation
brings to that of the mask. What differs: ``patch_heads.fit_patch_heads``, ``data.masks``. Other
heads (``segment_heads``) take the linear layer's place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.base import check_classes
from ssl_vit.data.pairs import CLASSES_FILE, Pairs
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import Machine, units_of
from ssl_vit.evaluators.frozen import BATCH, WARMUP
from ssl_vit.evaluators.options import Head, SegmentOptions
from ssl_vit.evaluators.overlap import Overlap
from ssl_vit.evaluators.patch_heads import (
    WEIGHT_DECAY,
    fit_patch_heads,
)
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.segment_heads import fit_head_modules
from ssl_vit.evaluators.segment_scores import Heads, Scored, held_out_miou, score_masks
from ssl_vit.evaluators.selection import split_tenth
from ssl_vit.evaluators.tokens import Material, gather_tokens, token_extractor
from ssl_vit.pictures.boundaries import boundaries_panel

log = logging.getLogger("ssl_vit")
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Of heads of several layers, which diverge at the larger ones.
DEEP_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
# The confusion matrix has the square of this; more values are depths or instances, not classes.
_MOST_CLASSES = 4096
_LARGEST_CONFUSION = 100
# Share of pixels without a class that leads to a warning; values of masks that may be images.
_MORE_IGNORED, _STRANGE = 0.02, 150


def fit(
    kind: Head,
    material: Material,
    rows: Int64[Tensor, " n"],
    classes: int,
    rates: tuple[float, ...],
    epochs: int,
    ignore: int,
    seed: int,
) -> Heads:
    """Fit a head of this kind for each learning rate."""
    if kind == "linear":
        return fit_patch_heads(material, rows, classes, rates, epochs, ignore, seed)
    return fit_head_modules(kind, material, rows, classes, rates, epochs, ignore, seed)


def choose_head(
    material: Material, classes: int, config: SegmentOptions, seed: int
) -> tuple[Heads, float, dict[str, float]]:
    """Select the learning rate on a held-out tenth, and retrain its head on all images.

    The tenth is of whole groups, where they are known and one can be held out. The lowest of equal
    rates. Returns the head, the rate, and each rate's held-out mIoU in %.
    """
    n = len(material.masks)
    check(n >= 10, f"{material.pairs.spec} has {n} readable pairs; a probe needs 10")
    groups = units_of(material.pairs, torch.arange(n))
    known = (material.masks != config.ignore).flatten(1).any(1)  # others cannot be judged
    kept, held = split_tenth(n, groups, fold(seed, 2), known)
    rest, rates = (config.epochs, config.ignore, seed), rates_of(config.head)
    trial = fit(config.head, material, kept, classes, rates, *rest)
    found = held_out_miou(trial, material, held, config.ignore)
    scores = [0.0 if math.isnan(score) else score for score in found]
    chosen = rates[scores.index(max(scores))]
    head = fit(config.head, material, torch.arange(n), classes, (chosen,), *rest)
    by_rate = {f"{r:g}": round(100 * s, 3) for r, s in zip(rates, scores, strict=True)}
    return head, chosen, by_rate


def rates_of(head: Head) -> tuple[float, ...]:
    """Learning rates to select from."""
    return LEARNING_RATES if head == "linear" else DEEP_RATES


def segment_probe(
    config: SegmentOptions,
    backbone: Backbone,
    train: Pairs,
    val: Pairs,
    machine: Machine,
    seed: int = 0,
) -> tuple[list[Score], dict[str, Any], UInt8[np.ndarray, "h w 3"]]:
    """Segmentation probe: train on ``train``, select on a tenth of it, score ``val`` once.

    Returns the scores, the protocol card, and a picture of boundaries of some images of ``val``.

    Raises:
        UserError: a network without patch tokens, pairs that do not fit together, or too few.
    """
    check_classes(train, val)
    extractor = token_extractor(backbone, config.blocks, machine)
    material = gather_tokens(extractor, train, config.cache_gb)
    names = train.classes or val.classes or ()
    classes = count_mask_classes(material.values, train.spec, len(names), config.ignore)
    head, rate, by_rate = choose_head(material, classes, config, seed)
    log.info("%s: %d classes of pixels", train.spec, classes)
    scored = score_masks(head, extractor, val, config)
    warn_ignored(material, scored, val, config.ignore)
    labels = names or tuple(map(str, range(classes)))
    chosen = {"chosen_lr": rate, "held_out_miou_by_lr": by_rate}
    score = segment_score(scored.overlap, labels, extractor.name, f"lr={rate:g}", seed, chosen)
    picture = boundaries_panel(val, backbone.view, scored.samples)
    return [score], card(config, material, scored.overlap, scored.bad), picture


def warn_ignored(material: Material, scored: Scored, val: Pairs, ignore: int) -> None:
    """Warn where far more of the validation pixels than of the training ones have no class: another
    number may have been meant by it there."""
    ours = float((material.masks == ignore).double().mean())
    theirs = 1 - int(scored.overlap.table.sum()) / max(1, scored.pixels)
    if theirs > 2 * ours + _MORE_IGNORED:
        log.warning(
            "warning: %.1f %% of the pixels of %s are %d and not judged (training: %.1f %%); if %d "
            "is a class there, write it as another number, or give another --ignore",
            *(100 * theirs, val.spec, ignore, 100 * ours, ignore),
        )


def segment_score(
    overlap: Overlap,
    classes: Sequence[str],
    features: str,
    setting: str,
    seed: int,
    details: dict[str, Any],
) -> Score:
    """Score of an overlap: mean IoU and Dice, and of each of the ``classes``."""

    def by_name(shares: Tensor) -> dict[str, float]:
        named = zip(classes, shares.tolist(), strict=True)
        return {name: 100 * share for name, share in named if not math.isnan(share)}

    details = details | {
        "dice_by_class": by_name(overlap.dice_by_class),
        "dice_by_class_mean_over_images": by_name(overlap.dice_by_image),
    }
    if overlap.groups is not None:
        details["interval_of_groups"] = len(overlap.groups.unique())
    return Score(
        features=features,
        setting=setting,
        metrics=overlap.metrics(),
        interval=overlap.interval(fold(seed, 3)),
        per_class=by_name(overlap.by_class),
        confusion=overlap.table.tolist() if len(classes) <= _LARGEST_CONFUSION else None,
        details=details,
    )


def count_mask_classes(present: Sequence[int], spec: str, named: int, ignore: int) -> int:
    """Number of classes: as many as are ``named``, or up to the highest in the masks.

    ``present``: values in the masks of ``spec``, in order.

    Raises:
        UserError: the masks have a class without a name, or fewer than two classes.
    """
    values = [v for v in present if v != ignore]
    beside = f" beside --ignore {ignore}" if ignore >= 0 else ""
    meant = ignore in present and f"; if {ignore} is a class, write it as another number"
    if not named and len(values) > _STRANGE:
        log.warning(
            "warning: the masks of %s have %d different values and no %s: if they are images, the "
            "folders are swapped",
            *(spec, len(values), CLASSES_FILE),
        )
    check(
        len(values) >= 2,
        f"the masks of {spec} have only {values}{beside}; at least two classes are needed"
        + (meant or ""),
    )
    check(
        not named or values[-1] < named,
        f"the masks of {spec} have class {values[-1]}, {CLASSES_FILE} names 0 to {named - 1}",
    )
    check(
        values[-1] < _MOST_CLASSES,
        f"the masks of {spec} go up to {values[-1]}{beside}; at most {_MOST_CLASSES} classes",
    )
    return named or values[-1] + 1


def card(config: SegmentOptions, material: Material, overlap: Overlap, bad: int) -> dict[str, Any]:
    """Protocol card of the probe."""
    view = "whole images, each side scaled to the size; masks scored at their own resolution"
    heads = {
        "linear": "linear",
        "mlp": "MLP, one hidden layer of 512",
        "transformer": "mask transformer of two blocks (Strudel et al. 2021)",
    }
    return {
        "probe": asdict(config)
        | {
            "head": "BatchNorm without affine (statistics of all training tokens), "
            + heads[config.head],
            "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}, warm-up {WARMUP}, cosine",
            "batch_size": BATCH,
            "learning_rates": rates_of(config.head),
            "view": view,
            "token_grid": material.extractor.grid,
            "tokens_kept": material.tokens is not None,
        },
        "pairs": {
            "train": len(material.masks),
            "train_unreadable": material.unreadable,
            "val": len(overlap.images),
            "val_unreadable": bad,
            "val_pixels": int(overlap.table.sum()),
        },
    }
