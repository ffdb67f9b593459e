"""Pictures of what an encoder sees: attention, reconstructions, and its patches' features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ssl_vit.commands.gallery import Drawn, images_of, in_parts, normalized, prepare
from ssl_vit.commands.neighbours import neighbours
from ssl_vit.commands.picture_options import (
    AttentionConfig,
    PcaConfig,
    PictureConfig,
    ReconstructionConfig,
    SimilarityConfig,
)
from ssl_vit.commands.reconstruction import open_reconstruction, reconstruction_panel
from ssl_vit.common.figures import save_png
from ssl_vit.data.missing import missing_in
from ssl_vit.evaluators.backbone import result_file
from ssl_vit.evaluators.features import ready
from ssl_vit.model.attention import attention_panel, cls_attention
from ssl_vit.pictures.patch_pca import pca_panel
from ssl_vit.pictures.similarity import similarity_panel


def attention(config: AttentionConfig) -> Drawn:
    """Attention maps of some images."""
    scene = prepare(config, config.count)
    images = images_of(scene)
    encoder = scene.plain_vit("attention")
    shown, maps, grid = [], [], encoder.grid
    for part in in_parts(images):
        batch, display = normalized(part, scene.view, scene.device)
        found, grid = cls_attention(encoder, batch)
        maps.append(found.cpu())
        shown.append(display)
    picture = attention_panel(np.concatenate(shown), torch.cat(maps), grid, config.mass)
    return Drawn(picture, len(images), scene.backbone)


def reconstruction(config: ReconstructionConfig) -> Drawn:
    """Reconstructions of some images."""
    scene = prepare(config, config.count)
    method = open_reconstruction(scene.backbone, scene.view.size)
    images = images_of(scene)
    ready(method, scene.device)
    batch = normalized(images, scene.view, scene.device)[0]
    display = scene.view.display(images).to(scene.device)
    missing = next(iter(missing_in([images.to(scene.device)])), None)
    how = config.mask_ratio, config.target, config.seed
    picture = reconstruction_panel(method, batch, display, *how, missing=missing)
    return Drawn(picture, len(images), scene.backbone)


def pca(config: PcaConfig) -> Drawn:
    """Patch PCA of some images."""
    return _of_patches(config, "pca", pca_panel)


def similarity(config: SimilarityConfig) -> Drawn:
    """Patch similarity of some images."""
    return _of_patches(config, "similarity", similarity_panel)


def _of_patches(config: PictureConfig, name: str, panel: Callable[..., np.ndarray]) -> Drawn:
    """A picture of the patch features of some images."""
    scene = prepare(config, config.count)
    images = images_of(scene)
    encoder = scene.plain_vit(name)
    shown, patches, grid = [], [], encoder.grid
    for part in in_parts(images):
        batch, display = normalized(part, scene.view, scene.device)
        features = encoder(batch)
        patches.append(features.patches.cpu())
        grid = features.grid
        shown.append(display)
    picture = panel(np.concatenate(shown), torch.cat(patches), grid)
    return Drawn(picture, len(images), scene.backbone)


_DRAW: dict[str, Callable[[Any], Drawn]] = {
    "attention": attention,
    "reconstruction": reconstruction,
    "pca": pca,
    "similarity": similarity,
    "neighbours": neighbours,
}


@torch.inference_mode()
def draw(name: str, config: PictureConfig) -> None:
    """Draw a picture, and print where it is."""
    drawn = _DRAW[name](config)
    out = result_file(config.out, drawn.backbone, f"{name}-images.png")
    save_png(out, drawn.picture)
    print(f"{name} of {drawn.images} images: {out}")
