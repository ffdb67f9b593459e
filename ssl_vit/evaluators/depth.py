"""Depth probe: depth of each pixel from an encoder's frozen feature maps.

The protocol is that of Oquab et al. 2023 (section 7.4): a linear layer to 256 bins of depth from
the last block or from four, or a DPT head on four. What differs: ``depth_heads``, ``fit_heads``,
and that images are neither cropped nor augmented.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.decode import BadImage
from ssl_vit.data.depths import DepthPairs, in_range
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.depth_heads import (
    BINS,
    CHANNELS,
    HEADS,
    MAPS,
    DepthHead,
    depth_loss,
)
from ssl_vit.evaluators.depth_metrics import image_metrics
from ssl_vit.evaluators.depth_options import DepthOptions
from ssl_vit.evaluators.depth_scores import depth_score, draw, score_depths
from ssl_vit.evaluators.features import Machine, units_of
from ssl_vit.evaluators.frozen import BATCH, WARMUP, training_batches
from ssl_vit.evaluators.map_material import MapExtractor, MapMaterial, gather_maps
from ssl_vit.evaluators.maps import maps_of
from ssl_vit.evaluators.patch_heads import WEIGHT_DECAY
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.selection import split_tenth
from ssl_vit.pictures.boundaries import evenly

log = logging.getLogger("ssl_vit")
LEARNING_RATES = {
    "linear": (1e-3, 3e-3, 1e-2, 3e-2),
    "linear4": (1e-3, 3e-3, 1e-2, 3e-2),
    "dpt": (3e-4, 1e-3, 3e-3),
}
_LEAST_PAIRS = 10
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
    batches = training_batches(material, rows, epochs, generator, "depth probe")
    for maps, depths, factor in batches:
        for head, optimizer, rate in zip(heads, optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
            depth_loss(head(maps), depths).backward()
            optimizer.step()
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
        warn_different_units(train, val)
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


def warn_different_units(train: DepthPairs, val: DepthPairs, scale: str = "--scale") -> None:
    """Warn where depths of two sets are so far apart that their units may differ. ``scale``: the
    option that is for both."""
    ours, theirs = _typical(train), _typical(val)
    if min(ours, theirs) > 0 and not 1 / _APART < ours / theirs < _APART:
        log.warning(
            "warning: depths of %s are around %.3g, of %s around %.3g: one %s is for both, which "
            "need one unit",
            *(train.spec, ours, val.spec, theirs, scale),
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


def greatest_depth(material: MapMaterial, config: DepthOptions) -> float:
    """Greatest depth of a valid pixel: as given, or that of the training maps, which is logged.

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


def _repeatable() -> AbstractContextManager[Any]:
    """Convolutions on CUDA by algorithms whose sums have one order, so that a score repeats, and in
    float32: what is not named here goes back to torch's defaults, of which TF32 is one."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


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
