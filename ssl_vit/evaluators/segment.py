"""Linear segmentation probe: classes of pixels from an encoder's frozen patch tokens.

The protocol is that of Oquab et al. 2023 (section 7.4, "linear"): BatchNorm and one linear layer
on each patch token give class logits at the patches' resolution, which bilinear interpolation
brings to that of the mask. What differs: ``patch_heads.fit_patch_heads``, ``data.masks``.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.seeds import fold
from ssl_vit.data.base import check_classes
from ssl_vit.data.order import permute
from ssl_vit.data.pairs import CLASSES_FILE, Pairs
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import Machine, units_of
from ssl_vit.evaluators.options import SegmentOptions
from ssl_vit.evaluators.overlap import Overlap, confusion_matrix, counts, iou
from ssl_vit.evaluators.patch_heads import (
    BATCH,
    WARMUP,
    WEIGHT_DECAY,
    PatchHeads,
    fit_patch_heads,
    upsampled,
)
from ssl_vit.evaluators.scores import Score
from ssl_vit.evaluators.selection import split_groups
from ssl_vit.evaluators.tokens import Material, TokenExtractor, gather_tokens, token_extractor

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# The confusion matrix has the square of this; more values are depths or instances, not classes.
_MOST_CLASSES = 4096
_LARGEST_CONFUSION = 100
# Maximum number of logits held at once when a mask is scored, 256 MB.
_VALUES = 1 << 26


def classify(logits: Float[Tensor, "c h w"], size: tuple[int, int]) -> Int64[Tensor, "r s"]:
    """Classify each of ``size`` pixels by its highest interpolated logit.

    In chunks of classes, so that a large mask with many classes fits in memory.
    """
    step = max(1, _VALUES // (size[0] * size[1]))
    best, guess = None, None
    for first in range(0, len(logits), step):
        value, index = upsampled(logits[None, first : first + step], size)[0].max(0)
        if best is None or guess is None:
            best, guess = value, index
            continue
        higher = value > best  # of equal ones the first
        best, guess = torch.where(higher, value, best), torch.where(higher, index + first, guess)
    assert guess is not None
    return guess


@torch.no_grad()
def held_out_miou(
    heads: PatchHeads, material: Material, rows: Int64[Tensor, " n"], ignore: int
) -> list[float]:
    """Held-out mean IoU of each head, 0 to 1, at 4 x 4 pixels per patch."""
    classes = heads.bias.shape[1]
    tables = [torch.zeros(classes, classes, dtype=torch.int64) for _ in heads.bias]
    for tokens, masks in material.batches(rows, BATCH):
        truth = known(masks, ignore).flatten()
        logits = heads(tokens)
        for table, head in zip(tables, logits.unbind(1), strict=True):
            fine = upsampled(head, (masks.shape[1], masks.shape[2]))
            table += confusion_matrix(truth, fine.argmax(1).flatten(), classes).cpu()
    return [float(iou(counts(table).double()).nanmean()) for table in tables]


def known(mask: Int[Tensor, "*shape"], ignore: int) -> Int[Tensor, "*shape"]:
    """Mask with -1 for pixels without a class."""
    return torch.where(mask == ignore, -1, mask)


@torch.no_grad()
def score_masks(
    heads: PatchHeads, extractor: TokenExtractor, pairs: Pairs, ignore: int
) -> tuple[Overlap, int]:
    """Score a head on all masks, at their own resolution; returns the number of unreadable pairs.

    Raises:
        UserError: a mask has a class that the head does not have, or no pixel has a class.
    """
    classes = heads.bias.shape[1]
    table, images, bad = torch.zeros(classes, classes, dtype=torch.int64), [], 0
    places = []
    for seen in extractor.batches(pairs):
        bad += len(seen.bad)
        if not seen.masks:
            continue
        for i, logits, mask in zip(
            seen.keys.tolist(), heads(seen.tokens)[:, 0], seen.masks, strict=True
        ):
            truth = known(mask.to(logits.device).long(), ignore)
            highest = int(truth.max())
            if highest >= classes:
                raise UserError(
                    f"the mask of {pairs.name(i)} has class {highest}, those of training go up to "
                    f"{classes - 1}; name all classes in {CLASSES_FILE} beside the masks"
                )
            guess = classify(logits, (mask.shape[0], mask.shape[1]))
            own = confusion_matrix(truth.flatten(), guess.flatten(), classes).cpu()
            table += own
            images.append(counts(own))
            places.append(i)
    check(int(table.sum()) > 0, f"{pairs.spec}: no pixel of its masks has a class")
    return Overlap(table, torch.stack(images), units_of(pairs, torch.tensor(places))), bad


def choose_head(
    material: Material, classes: int, config: SegmentOptions, seed: int
) -> tuple[PatchHeads, float, dict[str, float]]:
    """Select the learning rate on a held-out tenth, and retrain its head on all images.

    The tenth is of whole groups, where they are known and one can be held out. The lowest of equal
    rates. Returns the head, the rate, and each rate's held-out mIoU in %.
    """
    n = len(material.masks)
    check(n >= 10, f"{material.pairs.spec} has {n} readable pairs; a probe needs 10")
    shuffled = torch.from_numpy(permute(np.arange(n, dtype=np.int64), n, fold(seed, 2)))
    held, kept = shuffled[: max(1, n // 10)], shuffled[max(1, n // 10) :]
    groups = units_of(material.pairs, torch.arange(n))
    if groups is not None and (rows := split_groups(torch.zeros(n), groups, 0.1, fold(seed, 2))):
        kept, held = rows
    trial = fit_patch_heads(
        material, kept, classes, LEARNING_RATES, config.epochs, config.ignore, seed
    )
    scores = held_out_miou(trial, material, held, config.ignore)
    chosen = LEARNING_RATES[scores.index(max(scores))]
    head = fit_patch_heads(
        material, torch.arange(n), classes, (chosen,), config.epochs, config.ignore, seed
    )
    by_rate = {f"{r:g}": round(100 * s, 3) for r, s in zip(LEARNING_RATES, scores, strict=True)}
    return head, chosen, by_rate


def segment_probe(
    config: SegmentOptions,
    backbone: Backbone,
    train: Pairs,
    val: Pairs,
    machine: Machine,
    seed: int = 0,
) -> tuple[list[Score], dict[str, Any]]:
    """Segmentation probe: train on ``train``, select on a tenth of it, score ``val`` once.

    Returns the scores and the protocol card.

    Raises:
        UserError: a network without patch tokens, pairs that do not fit together, or too few.
    """
    check_classes(train, val)
    extractor = token_extractor(backbone, config.blocks, machine)
    material = gather_tokens(extractor, train, config.cache_gb)
    names = train.classes or val.classes or ()
    classes = count_mask_classes(material, len(names), config.ignore)
    head, rate, by_rate = choose_head(material, classes, config, seed)
    overlap, bad = score_masks(head, extractor, val, config.ignore)
    labels = names or tuple(map(str, range(classes)))
    shares = zip(labels, overlap.by_class.tolist(), strict=True)
    score = Score(
        features=extractor.name,
        setting=f"lr={rate:g}",
        metrics=overlap.metrics(),
        interval=overlap.interval(fold(seed, 3)),
        per_class={name: 100 * share for name, share in shares if not math.isnan(share)},
        confusion=overlap.table.tolist() if classes <= _LARGEST_CONFUSION else None,
        details={"chosen_lr": rate, "held_out_miou_by_lr": by_rate},
    )
    if overlap.groups is not None:
        score.details["interval_of_groups"] = len(overlap.groups.unique())
    return [score], card(config, material, overlap, bad)


def count_mask_classes(material: Material, named: int, ignore: int) -> int:
    """Number of classes: as many as are ``named``, or up to the highest in the masks.

    Raises:
        UserError: the masks have a class without a name, or fewer than two classes.
    """
    values = [v for v in material.values if v != ignore]
    spec = material.pairs.spec
    beside = f" beside --ignore {ignore}" if ignore >= 0 else ""
    check(
        len(values) >= 2,
        f"the masks of {spec} have only {values}{beside}; at least two classes are needed",
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
    return {
        "probe": asdict(config)
        | {
            "head": "BatchNorm without affine (statistics of all training tokens), linear",
            "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}, warm-up {WARMUP}, cosine",
            "batch_size": BATCH,
            "learning_rates": LEARNING_RATES,
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
