"""Online linear probe: published protocols, heads trained on augmented images, encoder frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.common.seeds import fold
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.bad_images import BadImages
from ssl_vit.data.base import Numbered
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.order import Order
from ssl_vit.data.sources import Source, Subset
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import FeatureSet, Machine, units_of
from ssl_vit.evaluators.linear import Parts, grid_quality, joined, protocol_details
from ssl_vit.evaluators.linear_heads import FeatureNorm, HeadOptimizer, LinearHeads, heads_of
from ssl_vit.evaluators.options import FEATURES, parts_of
from ssl_vit.evaluators.published import OnlineProtocol
from ssl_vit.evaluators.scores import Prediction, labelled
from ssl_vit.evaluators.selection import (
    NOT_CHOSEN,
    best,
    grid_of,
    guesses_of,
    outputs_of,
    split_rows,
    usable,
)
from ssl_vit.training.parallel import autocast, loader_workers

log = logging.getLogger("ssl_vit")


def online_probe(
    backbone: Backbone,
    train: Source,
    val: FeatureSet,
    protocol: OnlineProtocol,
    machine: Machine,
    extract: Callable[[Source], FeatureSet],
    held_out: Source | None = None,
) -> list[Prediction]:
    """Online linear probe: predict ``val`` (unaugmented) with a head trained on augmented images.

    If there is a grid, its point is selected on ``held_out``, or on a seeded share of the training
    images that is excluded from training; ``extract`` computes their features. Processes share
    each batch. The encoder must be in evaluation mode, on the machine's device.

    Raises:
        UserError: no labels, too few images, or none of the features.
    """
    targets, selection = source_targets(train), None
    names = usable(protocol.features, val.has)
    widths = {name: sum(val.parts[part].shape[1] for part in FEATURES[name]) for name in names}
    grid = grid_of(widths, protocol.learning_rates)
    fallback = protocol.fallback_of(grid)
    if len(grid) > 1:
        train, held_out = (train, held_out) if held_out else _split(train, targets, protocol)
        selection = extract(held_out) if held_out else None
        targets = source_targets(train)
    points = [fallback] if selection is None else grid
    norm = FeatureNorm if protocol.normed else lambda width: None
    outputs = outputs_of(targets)
    heads = heads_of(points, widths, outputs, protocol.seed, lambda name: norm(widths[name]))
    done = train_heads(heads, backbone, train, targets, protocol, machine)
    found = grid_quality(heads, selection) if selection else {}
    feature, rate = best(found) or fallback
    if len(grid) > 1 and not best(found):
        done["selection"] = NOT_CHOSEN
    logits = heads[feature].logits(val.feature(feature).to(machine.device), rate)
    details = protocol_details(protocol, found, done | {"lr": rate * done["batch_size"] / 256})
    return [Prediction(feature, f"lr={rate:g}", guesses_of(logits, targets).cpu(), details)]


def _split(
    train: Source, targets: Tensor, protocol: OnlineProtocol
) -> tuple[Source, Source | None]:
    """Split into training images and, if there are enough, images for selection."""
    groups = units_of(train, torch.arange(len(train)))
    rows = split_rows(targets, protocol.held_out, protocol.seed, groups)
    if rows is None:
        return train, None
    return Subset(train, rows[0].numpy()), Subset(train, rows[1].numpy())


def source_targets(source: Source, whose: str = "the training set") -> Tensor:
    """Targets of a source: (n,) classes, or (n, L) labels, NaN where unknown.

    Raises:
        UserError: labels are missing.
    """
    known = source.labels if source.targets is None else source.targets
    check(known is not None, f"{source.spec} has no labels; the probe needs them")
    return labelled(torch.from_numpy(np.asarray(known)), whose)


def train_heads(
    heads: dict[str, LinearHeads],
    backbone: Backbone,
    source: Source,
    targets: Tensor,
    protocol: OnlineProtocol,
    machine: Machine,
) -> dict[str, Any]:
    """Train heads on a source's augmented images; returns the resolved options.

    ``targets``: the source's, by image.
    """
    order = protocol.order(len(source), machine.at_once)
    for stack in heads.values():
        stack.to(machine.device).train()
    optimizer = HeadOptimizer(heads, protocol.momentum, protocol.trust, shared=order.world > 1)
    targets, names = targets.to(machine.device), tuple(heads)
    total = protocol.epochs * order.steps_per_epoch
    parts_seen = seen(backbone, source, names, protocol, order, total, machine)
    for step, (parts, numbers) in enumerate(parts_seen):
        if step % max(1, total // 10) == 0:
            log.info("linear probe (%s): step %d of %d", protocol.name, step, total)
        optimizer.step(joined(parts, names), targets[numbers], protocol.factor(step, order))
    return {"batch_size": order.batch_size, "steps": total}


def seen(
    backbone: Backbone,
    source: Source,
    names: tuple[str, ...],
    protocol: OnlineProtocol,
    order: Order,
    total: int,
    machine: Machine,
) -> Iterator[tuple[Parts, Tensor]]:
    """Features of each step, of this process' images: augmented, (b, D) parts, and indices."""
    view, device = backbone.view, machine.device
    spec = ViewSpec((Crop(view.size, scale=protocol.scale, flip=protocol.flip),))
    images = TrainImages(Numbered(source), spec, view.channels, fold(protocol.seed, 3))
    embed, normalize = backbone.embed(parts_of(names)), Normalize(view.mean, view.std).to(device)
    workers = loader_workers(machine.workers, device)
    batches = train_batches(images, order, 0, total, workers, device.type == "cuda")
    bad = BadImages(source, max_share=1.0)
    for _ in range(total):
        made, numbers = [], []
        for _ in range(order.accumulate):
            batch = next(batches)
            bad.note(batch)
            views = normalize(batch.views.to(device))
            with torch.no_grad(), autocast(device, machine.precision):
                made.append(embed(views.crops[0]))
            numbers.append(views.labels)
        yield {p: torch.cat([m[p].float() for m in made]) for p in made[0]}, torch.cat(numbers)
    bad.count()
