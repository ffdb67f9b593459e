"""Picture setup of the visualization command: options, images, the encoder on its device."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ssl_vit.commands.evaluating import look_at
from ssl_vit.commands.picture_options import PictureConfig
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Item
from ssl_vit.data.decode import BadImage
from ssl_vit.data.eval_images import EvalImages
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.sources import Source, open_source
from ssl_vit.data.tiles import is_cut, with_tiles
from ssl_vit.data.view import View
from ssl_vit.evaluators.backbone import Backbone, open_backbone
from ssl_vit.evaluators.features import ready
from ssl_vit.evaluators.watch import bounded
from ssl_vit.model.encoder import Encoder
from ssl_vit.pictures.thumbnails import as_rgb
from ssl_vit.training.parallel import prepare_device, resolve_device

log = logging.getLogger("ssl_vit")
_BATCH = 8


class Files(Source):
    """File source: image files by their paths, unlabelled."""

    def __init__(self, paths: tuple[str, ...], reading: ReadConfig) -> None:
        self.reading = reading
        self.spec, self.paths = " ".join(paths), [Path(p).expanduser() for p in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Item:
        try:
            return self.paths[i].read_bytes(), None
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def stream(self, i: int) -> io.IOBase:
        try:
            return self.paths[i].open("rb")
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def name(self, i: int) -> str:
        return str(self.paths[i])


@dataclass(frozen=True)
class Visualized:
    """Images to visualize and the opened encoder, not yet on its device."""

    source: Source
    backbone: Backbone
    device: torch.device

    @property
    def view(self) -> View:
        """View: size and statistics of the image preprocessing."""
        return self.backbone.view

    def plain_vit(self, picture: str) -> Encoder:
        """Encoder on its device, if it is a plain ViT.

        Raises:
            UserError: it is not, and ``picture`` needs one.
        """
        module = self.backbone.module
        check(
            isinstance(module, Encoder),
            f"--encoder is {self.backbone.name!r}, which is no plain ViT; {picture} shows a plain "
            "ViT's tokens, neighbours supports any encoder",
        )
        assert isinstance(module, Encoder)
        ready(module, self.device)
        return module


@dataclass(frozen=True)
class Drawn:
    """Drawn picture, with the number of its images and the encoder."""

    picture: np.ndarray
    images: int
    backbone: Backbone


def find_images(
    given: tuple[str, ...], reading: ReadConfig, channels: int, count: int, seed: int
) -> Source:
    """Source of ``--images``: all of the files, or at most ``count`` images of one source.

    ``channels``: those of the encoder.

    Raises:
        UserError: nothing is given, or no such file or source exists.
    """
    check(bool(given), "--images is missing; give image files, or one source such as folder:PATH")
    missing = [p for p in given if not Path(p).expanduser().is_file()]
    if not missing:
        files = Files(given, reading)
        return bounded(with_tiles(files, channels), count, seed) if is_cut(reading) else files
    if len(given) == 1:
        try:
            return bounded(open_source(given[0], reading, channels), count, seed)
        except UserError as error:
            also = "" if ":" in given[0] else "; nor is there such a file"
            raise UserError(f"--images: {error}{also}") from None
    raise UserError(f"--images: {missing[0]!r} is no such file; give files, or one source alone")


def prepare(config: PictureConfig, most: int) -> Visualized:
    """Images, encoder and device of a picture's options, with at most ``most`` images of a source.

    Raises:
        UserError: the images or the encoder are missing or cannot be opened.
    """
    check(bool(config.encoder), "--encoder is missing")
    backbone = open_backbone(config.encoder, config.seed, config.size)
    channels = backbone.view.channels
    source = find_images(config.images, config.data, channels, most, config.seed)
    device = resolve_device(config.device)
    prepare_device(device)
    return Visualized(source, backbone, device)


def images_of(scene: Visualized) -> Tensor:
    """Images to show, as of :func:`read_images`, with a warning if their values are far from
    those that the encoder was trained on.

    Raises:
        UserError: as :func:`read_images`, or they have other channels than the encoder takes.
    """
    try:
        look_at(scene.source, scene.backbone)
    except UserError as error:
        raise UserError(f"--images: {error}") from None
    return read_images(scene.source, scene.view)


def read_images(source: Source, view: View) -> Tensor:
    """Images (b, c, h, w), cropped as for evaluation but not normalised.

    An unreadable image of a source is logged and skipped; an unreadable file named by the user is
    an error.

    Raises:
        UserError: such a file, or every image of a source, cannot be read.
    """
    images = EvalImages(source, view.size, view.crop_ratio, view.channels)
    batch = images.__getitems__(range(len(source)))
    reasons = list(batch.bad.values())
    if reasons and (isinstance(source, Files) or not batch.views.crops):
        raise UserError(f"--images: {reasons[0]}")
    for reason in reasons:
        log.warning("unreadable image skipped: %s", reason)
    return batch.views.crops[0]


def normalized(
    images: Tensor, view: View, device: torch.device
) -> tuple[Float[Tensor, "b c h w"], UInt8[np.ndarray, "b h w 3"]]:
    """Normalised images on the device, and the same images for display.

    ``images`` are not modified.
    """
    made = Normalize(view.mean, view.std).to(device).images(images.clone().to(device))
    return made, as_rgb(images, view)


def in_parts(images: Tensor) -> tuple[Tensor, ...]:
    """Parts of a batch, small enough for the memory of any device."""
    return images.split(_BATCH)
