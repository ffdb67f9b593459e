"""Depth probe: depth of each pixel from an encoder's frozen feature maps.

The protocol is that of Oquab et al. 2023 (section 7.4): a linear layer to 256 bins of depth from
the last block or from four, or a DPT head on four. What differs: ``depth_heads``, ``fit_heads``,
and that images are neither cropped nor augmented.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.schedules import warmup_cosine
from ssl_vit.common.seeds import fold
from ssl_vit.data.decode import BadImage
from ssl_vit.data.depths import DepthPairs, crop_mask, in_range
from ssl_vit.data.loader import eval_batches
from ssl_vit.data.map_values import nearest_mask
from ssl_vit.data.pairs import PairImages
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.depth_heads import (
    BINS,
    CHANNELS,
    HEADS,
    MAPS,
    DepthHead,
    depth_loss,
)
from ssl_vit.evaluators.depth_metrics import DepthErrors, image_metrics
from ssl_vit.evaluators.depth_options import DepthHeadOptions, DepthOptions
from ssl_vit.evaluators.features import Machine, units_of
from ssl_vit.evaluators.map_material import MapExtractor, MapMaterial, SeenMaps, gather_maps
from ssl_vit.evaluators.maps import maps_of
from ssl_vit.evaluators.patch_heads import BATCH, WARMUP, WEIGHT_DECAY, upsampled
from ssl_vit.evaluators.scores import Score
from ssl_vit.evaluators.selection import split_tenth
from ssl_vit.pictures.boundaries import evenly
from ssl_vit.pictures.depth_panel import depth_panel
from ssl_vit.pictures.thumbnails import as_rgb

log = logging.getLogger("ssl_vit")
LEARNING_RATES = {
    "linear": (1e-3, 3e-3, 1e-2, 3e-2),
    "linear4": (1e-3, 3e-3, 1e-2, 3e-2),
    "dpt": (3e-4, 1e-3, 3e-3),
}
_LEAST_PAIRS = 10
_SHOWN = 6
_TOLD = 100  # steps between words on them
# Maps looked at for their typical depth, and how much that may differ between two sets.
_TYPICAL, _APART = 16, 20.0


def fit_heads(
    make: Callable[[], DepthHead],
    material: MapMaterial,
    rows: Int64[Tensor, " n"],
    rates: tuple[float, ...],
    epochs: int,
    seed: int,
) -> list[DepthHead]:
    """Fit a head for each learning rate, all from the same start on the same batches of ``rows``.

    AdamW, weight decay 1e-4, linear warm-up over a tenth, then half a cosine to 0. Maps are
    standardised by their exact statistics over the training images; the loss is that of
    predictions, at most 4 x 4 per place of the finest map.
    """
    device = material.extractor.machine.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, 1))
        first = make()
    first.standardise(material.statistics)
    heads = [deepcopy(first).to(device) for _ in rates]
    optimizers = [
        torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        for head, rate in zip(heads, rates, strict=True)
    ]
    generator = torch.Generator().manual_seed(fold(seed, 1))
    # At least 8 batches per epoch, so that small sets get enough steps.
    size = max(1, min(BATCH, len(rows) // 8))
    total, step = epochs * math.ceil(len(rows) / size), 0
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for maps, depths in material.batches(order, size):
            factor = warmup_cosine(step, warmup=round(WARMUP * total), total=total, peak=1.0)
            for head, optimizer, rate in zip(heads, optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
                optimizer.zero_grad()
                depth_loss(head(maps), depths).backward()
                optimizer.step()
            step += 1
            if step % _TOLD == 0:
                log.info("depth probe: step %d of %d", step, total)
    return heads


@torch.no_grad()
def held_out_delta1(
    heads: list[DepthHead], material: MapMaterial, rows: Int64[Tensor, " n"]
) -> list[float]:
    """Held-out delta1 of each head, in %: mean over images, at the resolution of training.

    A head without finite depths has 0, as have all where no pixel is valid.
    """
    found: list[list[float]] = [[0.0] for _ in heads]
    for maps, depths in material.batches(rows, BATCH):
        for values, head in zip(found, heads, strict=True):
            for made, truth in zip(head(maps), depths, strict=True):
                if (known := truth > 0).any():
                    values.append(float(image_metrics(made[known], truth[known])[0]))
    return [sum(values) / max(1, len(values) - 1) for values in found]


def choose_head(
    make: Callable[[], DepthHead], material: MapMaterial, config: DepthOptions, seed: int
) -> tuple[DepthHead, float, dict[str, float]]:
    """Select the learning rate on a held-out tenth, and retrain its head on all images.

    The lowest of equal rates. Returns the head, the rate, and each rate's held-out delta1 in %.
    """
    n, rates = len(material.depths), LEARNING_RATES[config.head]
    kept, held = split_tenth(n, units_of(material.pairs, torch.arange(n)), fold(seed, 2))
    trial = fit_heads(make, material, kept, rates, config.epochs, seed)
    scores = held_out_delta1(trial, material, held)
    chosen = rates[scores.index(max(scores))]
    (head,) = fit_heads(make, material, torch.arange(n), (chosen,), config.epochs, seed)
    by_rate = {f"{r:g}": round(x, 3) for r, x in zip(rates, scores, strict=True)}
    return head, chosen, by_rate


@torch.no_grad()
def predict(head: DepthHead, seen: SeenMaps) -> Float[Tensor, "b rows columns"]:
    """Depths of the images of a batch, few at a time: 256 bins of each place take memory."""
    parts = zip(*(x.split(BATCH) for x in seen.maps), strict=True)
    return torch.cat([head([x.float() for x in part]) for part in parts])


@torch.no_grad()
def score_depths(
    head: DepthHead,
    extractor: MapExtractor,
    pairs: DepthPairs,
    config: DepthHeadOptions,
    most: float,
) -> tuple[DepthErrors, dict[str, int]]:
    """Score a head on all depth maps, at their own resolution; with counts for the card.

    Raises:
        UserError: no pixel has a depth in the range and the crop, or a map has not the crop's size.
    """
    found, places = [], []
    count = dict.fromkeys(("val_unreadable", "val_empty", "val_pixels", "val_pixels_beyond"), 0)
    for seen in extractor.batches(pairs):
        count["val_unreadable"] += len(seen.bad)
        if not seen.maps:
            continue
        made = predict(head, seen)
        for i, coarse, truth in zip(seen.keys.tolist(), made, seen.depths, strict=True):
            rows, columns = truth.shape
            scored = crop_mask(config.crop, (rows, columns), pairs.name(i))
            valid = scored & in_range(truth, config.min_depth, most)
            count["val_pixels"] += int(valid.sum())
            count["val_pixels_beyond"] += int((scored & (truth > most)).sum())
            if not valid.any():
                count["val_empty"] += 1
                continue
            depth = upsampled(coarse[None, None], (rows, columns))[0, 0]
            valid = valid.to(depth.device)
            found.append(image_metrics(depth[valid], truth.to(depth.device)[valid]))
            places.append(i)
    within = f"a depth from {config.min_depth:g} to {most:g}, in the unit of --scale"
    crop = "" if config.crop == "none" else f" in the crop {config.crop}"
    check(bool(found), f"{pairs.spec}: no pixel of its depth maps has {within}{crop}")
    return DepthErrors(torch.stack(found), units_of(pairs, torch.tensor(places))), count


def depth_probe(
    config: DepthOptions,
    backbone: Backbone,
    train: DepthPairs,
    val: DepthPairs,
    machine: Machine,
    seed: int = 0,
) -> tuple[list[Score], dict[str, Any], UInt8[np.ndarray, "height width 3"] | None]:
    """Depth probe: train on ``train``, select on a tenth of it, score ``val`` once.

    Returns the scores, the protocol card, and a picture of some validation images.

    Raises:
        UserError: a network without feature maps, too few pairs, or maps without a valid depth.
    """
    maps = maps_of(backbone, MAPS[config.head], spread=True)
    extractor = MapExtractor(maps, backbone.view, machine)
    with _repeatable():
        material = gather_maps(extractor, train, config.cache_gb)
        n = len(material.depths)
        check(n >= _LEAST_PAIRS, f"{train.spec} has {n} readable pairs; a probe needs 10")
        most = greatest_depth(material, config)
        tell_units(train, val)
        within = in_range(material.depths, config.min_depth, most)
        material.depths[~within] = 0.0
        kind = HEADS[config.head]
        head, rate, by_rate = choose_head(
            lambda: kind(maps.widths, config.min_depth, most), material, config, seed
        )
        errors, count = score_depths(head, extractor, val, config, most)
        picture = draw(head, extractor, val, config, most)
    if beyond := count["val_pixels_beyond"]:
        text = "%s: %d pixels are deeper than %g and are not scored (%d are)"
        log.info(text, val.spec, beyond, most, count["val_pixels"])
    chosen = {"chosen_lr": rate, "held_out_delta1_by_lr": by_rate}
    score = depth_score(errors, f"{config.head} head", f"lr={rate:g}", seed, chosen)
    pairs = {"train": n, "train_unreadable": material.unreadable, "val": len(errors.images)}
    return [score], card(config, material, most) | {"pairs": pairs | count}, picture


def tell_units(train: DepthPairs, val: DepthPairs) -> None:
    """Warn where depths of two sets are so far apart that their units may differ."""
    ours, theirs = _typical(train), _typical(val)
    if min(ours, theirs) > 0 and not 1 / _APART < ours / theirs < _APART:
        log.warning(
            "warning: depths of %s are around %.3g, of %s around %.3g: one --scale is for both, "
            "which need one unit",
            *(train.spec, ours, val.spec, theirs),
        )


def _typical(pairs: DepthPairs) -> float:
    """Median depth of some maps; 0 where none is known."""
    found = []
    for i in evenly(len(pairs), _TYPICAL):
        with suppress(BadImage):
            depth = pairs.target(i)
            found += [depth[depth > 0]]
    known = torch.cat(found) if found else torch.zeros(0)
    return float(known.median()) if len(known) else 0.0


def depth_score(
    errors: DepthErrors, features: str, setting: str, seed: int, details: dict[str, Any]
) -> Score:
    """Score of the errors of all images."""
    if errors.groups is not None:
        details = details | {"interval_of_groups": len(errors.groups.unique())}
    interval = errors.interval(fold(seed, 3))
    return Score(features, setting, errors.metrics(), interval, {}, None, details)


def greatest_depth(material: MapMaterial, config: DepthOptions) -> float:
    """Greatest depth of a valid pixel: as given, or that of the training maps, which is said.

    Raises:
        UserError: no training map has a depth in the range.
    """
    spec, least = material.pairs.spec, config.min_depth
    most = config.max_depth or material.highest
    known = most > least and bool(in_range(material.depths, least, most).any())
    upper = f" to {config.max_depth:g}" if config.max_depth else ""
    check(
        known,
        f"{spec}: no pixel of its depth maps has a depth from {least:g}{upper}; the greatest is "
        f"{material.highest:g}, in the unit of --scale",
    )
    if not config.max_depth:
        log.info("--max-depth is %g, the greatest depth of %s", most, spec)
    return most


@torch.no_grad()
def draw(
    head: DepthHead,
    extractor: MapExtractor,
    pairs: DepthPairs,
    config: DepthHeadOptions,
    most: float,
) -> UInt8[np.ndarray, "height width 3"] | None:
    """Picture of some images, evenly spread; None if none of them is readable.

    Maps are shown at the size that the encoder sees.
    """
    count, view = min(_SHOWN, len(pairs)), extractor.view
    places = torch.from_numpy(np.linspace(0, len(pairs) - 1, count).round().astype(np.int64))
    shown, true, made = [], list[Tensor](), list[Tensor]()
    some = pairs.take(places)
    for batch in eval_batches(PairImages(some, view.size, view.channels), count, 0, False):
        shown += [as_rgb(crops, view) for crops in batch.views.crops]
    for seen in extractor.batches(some):
        true += [valid_depth(nearest_mask(depth, view.size), config, most) for depth in seen.depths]
        if seen.maps:
            made += list(upsampled(predict(head, seen)[:, None], view.size)[:, 0].cpu())
    if not true:
        return None
    return depth_panel(np.concatenate(shown), torch.stack(true), torch.stack(made))


def valid_depth(depth: Float32[Tensor, "h w"], config: DepthHeadOptions, most: float) -> Tensor:
    """Depth, 0 where it is not in the range."""
    return torch.where(in_range(depth, config.min_depth, most), depth, 0.0)


def _repeatable() -> AbstractContextManager[Any]:
    """Convolutions on CUDA by algorithms whose sums have one order, so that a score repeats."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)


def card(config: DepthOptions, material: MapMaterial, most: float) -> dict[str, Any]:
    """Protocol card of the probe."""
    linear = f"linear on standardised maps, {BINS} bins evenly spaced, weights relu + 0.1"
    dpt = f"DPT, {CHANNELS} channels, on standardised maps, {BINS} bins evenly spaced"
    extractor = material.extractor
    return {
        "probe": asdict(config)
        | {
            "head": dpt if config.head == "dpt" else linear,
            "head_option": config.head,
            "map_widths": extractor.maps.widths,
            "map_strides": extractor.maps.strides,
            "maps_kept": material.maps is not None,
            "trained_at": tuple(material.depths.shape[1:]),
            "max_depth": most,
            "max_depth_from": "given" if config.max_depth else "greatest of the training maps",
            "valid": "finite, above 0, from min_depth to max_depth, in the crop",
            "averaged": "over images, of each image's valid pixels; delta1 is the first metric, "
            "as more of it is better",
            "loss": "sqrt(var(g) + 0.15 mean(g)^2) + 0.5 gradient, of the log depth",
            "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}, warm-up {WARMUP}, cosine",
            "batch_size": BATCH,
            "learning_rates": LEARNING_RATES[config.head],
            "view": "whole images, each side scaled to the size; maps scored at their own "
            "resolution",
        },
    }
