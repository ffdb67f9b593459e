"""Neighbours picture: images, and those with the most similar features."""

from __future__ import annotations

import logging

import numpy as np
import torch

from ssl_vit.commands.evaluating import look_at
from ssl_vit.commands.gallery import Drawn, Files, Visualized, normalized, prepare, read_images
from ssl_vit.commands.picture_options import GalleryData, NeighboursConfig
from ssl_vit.common.errors import UserError, check
from ssl_vit.data.sources import Source, Subset, open_source
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import FeatureSet, Machine, extract, ready
from ssl_vit.evaluators.options import parts_of
from ssl_vit.evaluators.retrieval import nearest_images, same_class
from ssl_vit.evaluators.watch import bounded, bounded_rows
from ssl_vit.methods import method_names
from ssl_vit.methods.base import find_method
from ssl_vit.pictures.neighbours import neighbours_panel

log = logging.getLogger("ssl_vit")
_NEIGHBOURS = 7


def neighbours(config: NeighboursConfig) -> Drawn:
    """Nearest neighbours of some images, framed by class where both have labels."""
    itself = not config.data.train or config.images == (config.data.train,)
    scene = prepare(config, config.gallery if itself else config.count)
    gallery = scene.source
    if not itself:
        gallery = bounded(
            _open_gallery(config.data, scene.view.channels), config.gallery, config.seed
        )
    k = _enough(config.k, len(gallery), itself)
    feature = config.features or _default_feature(scene.backbone)
    allowed = scene.backbone.features
    check(feature in allowed, f"--features is {feature!r}; of this encoder: {', '.join(allowed)}")
    look_at(gallery, scene.backbone, config.seed)
    if isinstance(scene.source, Files):
        read_images(scene.source, scene.view)  # raises for a file that cannot be read
    found = _features(scene, gallery, feature, config.data.workers)
    k = _enough(config.k, len(found.index), itself)
    rows = None
    queries = found
    if itself:
        count = len(found.index) if isinstance(gallery, Files) else config.count
        rows = torch.from_numpy(bounded_rows(len(found.index), count, config.seed))
        queries = found.take(rows)
    else:
        queries = _features(scene, scene.source, feature, config.data.workers)
    places, cosines = nearest_images(queries.feature(feature), found.feature(feature), k, rows)
    asked = _shown(scene, scene.source, queries.index)
    answers = _shown(scene, gallery, found.index[places.flatten()])
    same = same_class((scene.source, queries), (gallery, found.take(places.flatten())))
    about = f"Nearest neighbours by {feature} features, among {len(found.index):,} images."
    picture = neighbours_panel(
        asked, answers.reshape(*places.shape, *answers.shape[1:]), cosines, same, about
    )
    return Drawn(picture, len(asked), scene.backbone)


def _open_gallery(data: GalleryData, channels: int) -> Source:
    try:
        return open_source(data.train, data, channels)
    except UserError as error:
        raise UserError(f"--data.train: {error}") from None


def _enough(k: int, images: int, itself: bool) -> int:
    """Number of neighbours shown for each image.

    Raises:
        UserError: there are fewer images.
    """
    there = images - itself
    besides = " besides the image itself" if itself else ""
    check(
        max(1, k) <= there,
        f"--k is {max(1, k)}; the images to search are {there}{besides}",
    )
    return k or min(_NEIGHBOURS, there)


def _default_feature(backbone: Backbone) -> str:
    """Feature by which pretraining monitors the encoder's method, if the encoder has it."""
    method = backbone.info.method if backbone.info else ""
    wanted = find_method(method).pooling if method in method_names() else "cls"
    return wanted if wanted in backbone.features else backbone.poolings[0]


def _features(scene: Visualized, source: Source, feature: str, workers: int) -> FeatureSet:
    """Features of all readable images; loader processes are started for many images only."""
    if scene.backbone.module is not None:
        ready(scene.backbone.module, scene.device)
    many = len(source) > 500
    machine = Machine(scene.device, torch.float32, workers if many else 0, at_once=64)
    if many:
        log.info("features of %s images of %s", f"{len(source):,}", source.spec)
    return extract(scene.backbone.embed(parts_of((feature,))), source, scene.view, machine)


def _shown(scene: Visualized, source: Source, index: torch.Tensor) -> np.ndarray:
    """Images of a source for display, cropped as for the encoder."""
    images = read_images(Subset(source, index.numpy()), scene.view)
    return normalized(images, scene.view, torch.device("cpu"))[1]
