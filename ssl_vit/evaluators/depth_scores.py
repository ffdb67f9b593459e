"""Depth scores: depths predicted by a head on feature maps, against the true ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from ssl_vit.common.checks import flag
from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.depths import DepthPairs, crop_mask, in_range
from ssl_vit.data.eval_images import eval_batches
from ssl_vit.data.map_values import nearest_mask
from ssl_vit.data.pairs import PairImages
from ssl_vit.evaluators.depth_heads import DepthHead
from ssl_vit.evaluators.depth_metrics import DepthErrors, image_metrics
from ssl_vit.evaluators.depth_options import DepthHeadOptions
from ssl_vit.evaluators.features import units_of
from ssl_vit.evaluators.frozen import BATCH
from ssl_vit.evaluators.map_material import MapExtractor, SeenMaps
from ssl_vit.evaluators.patch_heads import upsampled
from ssl_vit.evaluators.score import Score
from ssl_vit.pictures.depth_panel import depth_panel
from ssl_vit.pictures.thumbnails import as_rgb

_SHOWN = 6


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
    unit = f"in the unit of {flag(config, 'scale')}"
    within = f"a depth from {config.min_depth:g} to {most:g}, {unit}"
    crop = "" if config.crop == "none" else f" in the crop {config.crop}"
    check(bool(found), f"{pairs.spec}: no pixel of its depth maps has {within}{crop}")
    return DepthErrors(torch.stack(found), units_of(pairs, torch.tensor(places))), count


def depth_score(
    errors: DepthErrors, features: str, setting: str, seed: int, details: dict[str, Any]
) -> Score:
    """Score of the errors of all images."""
    if errors.groups is not None:
        details = details | {"interval_of_groups": len(errors.groups.unique())}
    interval = errors.interval(fold(seed, 3))
    return Score(features, setting, errors.metrics(), interval, {}, None, details)


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
