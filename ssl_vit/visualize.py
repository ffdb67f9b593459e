"""The picture door: ``python -m ssl_vit.visualize attention --encoder RUN --images ...``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssl_vit.commands.cli import find_recipe, layered, run_door, split_config, subcommand
from ssl_vit.commands.gallery import (
    Files,
    PictureConfig,
    Scene,
    in_parts,
    normalized,
    prepare,
    read_images,
)
from ssl_vit.commands.reconstruction import open_reconstruction, reconstruction_panel
from ssl_vit.common.config import UserError, check
from ssl_vit.common.figures import save_png
from ssl_vit.data.sources import Source, Subset, open_source
from ssl_vit.evaluators.backbone import Backbone, result_file
from ssl_vit.evaluators.features import FeatureSet, Machine, extract, parts_of, ready
from ssl_vit.evaluators.retrieval import nearest_images, same_class
from ssl_vit.evaluators.watch import bounded, bounded_rows
from ssl_vit.methods.base import Target, find_method, method_names
from ssl_vit.model.attention import attention_panel, cls_attention
from ssl_vit.pictures.neighbours import neighbours_panel
from ssl_vit.pictures.patch_pca import pca_panel

log = logging.getLogger("ssl_vit")
_NEIGHBOURS = 7
_PROG = "python -m ssl_vit.visualize"


@dataclass(frozen=True)
class Made:
    """A picture, of how many images it is, and of which encoder."""

    picture: np.ndarray
    images: int
    backbone: Backbone


@dataclass(frozen=True)
class AttentionConfig(PictureConfig):
    """What the [CLS] token attends to in the last block, head by head."""

    mass: float = 0.6
    """Share of the attention to patches that the shown sets of patches hold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.mass <= 1, f"--mass is {self.mass}; above 0, at most 1")


def attention(config: AttentionConfig) -> Made:
    """The attention maps of some images."""
    scene = prepare(config, config.count)
    images = read_images(scene.source, scene.view)
    encoder = scene.plain_vit("attention")
    shown, maps, grid = [], [], encoder.grid
    for part in in_parts(images):
        batch, display = normalized(part, scene.view, scene.device)
        found, grid = cls_attention(encoder, batch)
        maps.append(found.cpu())
        shown.append(display)
    picture = attention_panel(np.concatenate(shown), torch.cat(maps), grid, config.mass)
    return Made(picture, len(images), scene.backbone)


@dataclass(frozen=True)
class ReconstructionConfig(PictureConfig):
    """Masked images and what a method that predicts them makes of them: of a run, or of a file with
    a decoder."""

    mask_ratio: float = 0.0
    """Share of the patches that is hidden. 0: as in training, where that is known; else 0.75."""
    target: Target = "auto"
    """What the decoder predicts: pixels, or patches normalized by their own mean and variance.
    auto: as the run or file says; if it does not, what explains these very images better."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.mask_ratio
        check(0 <= ratio < 1, f"--mask-ratio is {ratio}; between 0 and 1, or 0: as in training")


def reconstruction(config: ReconstructionConfig) -> Made:
    """Reconstructions of some images."""
    scene = prepare(config, config.count)
    method = open_reconstruction(scene.backbone, scene.view.size)
    images = read_images(scene.source, scene.view)
    ready(method, scene.device)
    batch = normalized(images, scene.view, scene.device)[0]
    display = scene.view.display(images).to(scene.device)
    picture = reconstruction_panel(
        method, batch, display, config.mask_ratio, config.target, config.seed
    )
    return Made(picture, len(images), scene.backbone)


@dataclass(frozen=True)
class PcaConfig(PictureConfig):
    """Patch features as colours: their principal components over all images together."""


def pca(config: PcaConfig) -> Made:
    """The principal components of some images' patch features."""
    scene = prepare(config, config.count)
    images = read_images(scene.source, scene.view)
    encoder = scene.plain_vit("pca")
    shown, patches, grid = [], [], encoder.grid
    for part in in_parts(images):
        batch, display = normalized(part, scene.view, scene.device)
        features = encoder(batch)
        patches.append(features.patches.cpu())
        grid = features.grid
        shown.append(display)
    picture = pca_panel(np.concatenate(shown), torch.cat(patches), grid)
    return Made(picture, len(images), scene.backbone)


@dataclass(frozen=True)
class NeighboursConfig(PictureConfig):
    """Images, and those whose features are most alike."""

    among: str = ""
    """A source of images to find neighbours among, named as for pretraining. Empty: the images
    themselves; each leaves itself out."""
    k: int = 0
    """Neighbours shown of each image. 0: seven, or as many as there are."""
    pooling: str = ""
    """The feature: cls, mean, ... as evaluate has them. Empty: what the method is watched by, mean
    for MAE and cls for DINO; of other encoders cls where they have it."""
    gallery: int = 10000
    """At most this many images are searched, a seeded choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.k >= 0, f"--k is {self.k}; at least 1, or 0: seven, or as many as there are")
        check(self.gallery >= 1, f"--gallery is {self.gallery}; at least 1")


def neighbours(config: NeighboursConfig) -> Made:
    """The neighbours of some images, framed by class where both have labels."""
    itself = not config.among or config.images == (config.among,)
    scene = prepare(config, config.gallery if itself else config.count)
    gallery = scene.source
    if not itself:
        gallery = bounded(_open_among(config.among), config.gallery, config.seed)
    k = _enough(config.k, len(gallery), itself)
    feature = config.pooling or _watched_by(scene.backbone)
    allowed = scene.backbone.features
    check(feature in allowed, f"--pooling is {feature!r}; of this encoder: {', '.join(allowed)}")
    if isinstance(scene.source, Files):
        read_images(scene.source, scene.view)  # refuses what cannot be read
    found = _features(scene, gallery, feature)
    k = _enough(config.k, len(found.index), itself)
    rows = None
    queries = found
    if itself:
        count = len(found.index) if isinstance(gallery, Files) else config.count
        rows = torch.from_numpy(bounded_rows(len(found.index), count, config.seed))
        queries = found.take(rows)
    else:
        queries = _features(scene, scene.source, feature)
    places, cosines = nearest_images(queries.feature(feature), found.feature(feature), k, rows)
    asked = _shown(scene, scene.source, queries.index)
    answers = _shown(scene, gallery, found.index[places.flatten()])
    same = same_class((scene.source, queries), (gallery, found.take(places.flatten())))
    about = f"Most alike by {feature} features, among {len(found.index):,} images."
    picture = neighbours_panel(
        asked, answers.reshape(*places.shape, *answers.shape[1:]), cosines, same, about
    )
    return Made(picture, len(asked), scene.backbone)


def _open_among(spec: str) -> Source:
    try:
        return open_source(spec)
    except UserError as error:
        raise UserError(f"--among: {error}") from None


def _enough(k: int, images: int, itself: bool) -> int:
    """How many neighbours are shown of each image."""
    there = images - itself
    besides = " besides the image itself" if itself else ""
    check(
        max(1, k) <= there,
        f"--k is {max(1, k)}; images to find neighbours among are {there}{besides}",
    )
    return k or min(_NEIGHBOURS, there)


def _watched_by(backbone: Backbone) -> str:
    """The feature that an encoder's method is watched by, if it has that."""
    method = backbone.info.method if backbone.info else ""
    wanted = find_method(method).pooling if method in method_names() else "cls"
    return wanted if wanted in backbone.features else backbone.poolings[0]


def _features(scene: Scene, source: Source, feature: str) -> FeatureSet:
    """Features of all readable images; loader processes start only where they pay."""
    if scene.backbone.module is not None:
        ready(scene.backbone.module, scene.device)
    workers = -1 if len(source) > 500 else 0
    machine = Machine(scene.device, torch.float32, workers, at_once=64)
    if len(source) > 500:
        log.info("features of %s images of %s", f"{len(source):,}", source.spec)
    return extract(scene.backbone.embed(parts_of((feature,))), source, scene.view, machine)


def _shown(scene: Scene, source: Source, index: torch.Tensor) -> np.ndarray:
    """Images of a source for people, prepared as the encoder saw them."""
    images = read_images(Subset(source, index.numpy()), scene.view)
    return normalized(images, scene.view, torch.device("cpu"))[1]


_PICTURES: dict[str, tuple[type[PictureConfig], Callable[[Any], Made]]] = {
    "attention": (AttentionConfig, attention),
    "reconstruction": (ReconstructionConfig, reconstruction),
    "pca": (PcaConfig, pca),
    "neighbours": (NeighboursConfig, neighbours),
}


@torch.inference_mode()
def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    name = subcommand(argv, _PROG, "picture", list(_PICTURES))
    configs, flags = split_config(argv[1:])
    kind, draw = _PICTURES[name]
    files = [find_recipe(c) for c in configs]
    config = layered(kind(), files, flags, f"{_PROG} {name}", kind.__doc__ or "", kind)
    made = draw(config)
    out = result_file(config.out, made.backbone, f"{name}-images.png")
    save_png(out, made.picture)
    print(f"{name} of {made.images} images: {out}")
    return 0


if __name__ == "__main__":
    run_door(main)
