"""Visualization command: ``python -m ssl_vit.visualize attention --encoder RUN --images ...``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssl_vit.commands.cli import find_recipe, layered, run_door, split_config, subcommand
from ssl_vit.commands.gallery import (
    Drawn,
    PictureConfig,
    images_of,
    in_parts,
    normalized,
    prepare,
)
from ssl_vit.commands.neighbours import NeighboursConfig, neighbours
from ssl_vit.commands.reconstruction import open_reconstruction, reconstruction_panel
from ssl_vit.common.checks import check_portion
from ssl_vit.common.errors import check
from ssl_vit.common.figures import save_png
from ssl_vit.data.missing import missing_in
from ssl_vit.evaluators.backbone import result_file
from ssl_vit.evaluators.features import ready
from ssl_vit.model.attention import attention_panel, cls_attention
from ssl_vit.objectives.base import Target
from ssl_vit.pictures.patch_pca import pca_panel
from ssl_vit.pictures.similarity import similarity_panel

_PROG = "python -m ssl_vit.visualize"


@dataclass(frozen=True)
class AttentionConfig(PictureConfig):
    """Attention maps of the [CLS] token in the last block, for each head."""

    mass: float = 0.6
    """Share of the attention to patches that the highlighted sets of patches contain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_portion(self, "mass")


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


@dataclass(frozen=True)
class ReconstructionConfig(PictureConfig):
    """Reconstructions of masked images, from a run or a file with a decoder."""

    mask_ratio: float = 0.0
    """Share of the patches that are masked. 0: as in training if known, else 0.75."""
    target: Target = "auto"
    """Target of the decoder: pixels, or patches normalized by their own mean and variance. auto: as
    the run or file states; if it does not, the one that explains these images better."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.mask_ratio
        check(
            0 <= ratio < 1, f"--mask-ratio is {ratio}; it must be in (0, 1), or 0: as in training"
        )


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


@dataclass(frozen=True)
class PcaConfig(PictureConfig):
    """Patch PCA: principal components of patch features over all images, as colours."""


def pca(config: PcaConfig) -> Drawn:
    """Patch PCA of some images."""
    return _of_patches(config, "pca", pca_panel)


@dataclass(frozen=True)
class SimilarityConfig(PictureConfig):
    """Patch similarity: how like some marked patches all patches of an image are."""


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


_PICTURES: dict[str, tuple[type[PictureConfig], Callable[[Any], Drawn]]] = {
    "attention": (AttentionConfig, attention),
    "reconstruction": (ReconstructionConfig, reconstruction),
    "pca": (PcaConfig, pca),
    "similarity": (SimilarityConfig, similarity),
    "neighbours": (NeighboursConfig, neighbours),
}


@torch.inference_mode()
def main(argv: list[str]) -> int:
    """Visualization command; returns the exit status."""
    name = subcommand(argv, _PROG, "picture", list(_PICTURES))
    configs, flags = split_config(argv[1:])
    kind, draw = _PICTURES[name]
    files = [find_recipe(c) for c in configs]
    config = layered(kind(), files, flags, f"{_PROG} {name}", kind.__doc__ or "", kind)
    drawn = draw(config)
    out = result_file(config.out, drawn.backbone, f"{name}-images.png")
    save_png(out, drawn.picture)
    print(f"{name} of {drawn.images} images: {out}")
    return 0


if __name__ == "__main__":
    run_door(main)
