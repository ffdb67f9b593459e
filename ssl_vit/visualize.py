"""The picture door: ``python -m ssl_vit.visualize attention --encoder RUN --images ...``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_vit.attention import attention_panel, cls_attention
from ssl_vit.cli import find_recipe, layered, run_door, split_config, subcommand
from ssl_vit.config import UserError, check
from ssl_vit.data.augment import Normalize
from ssl_vit.data.base import Item
from ssl_vit.data.decode import BadImage
from ssl_vit.data.loader import EvalImages
from ssl_vit.data.sources import Source, open_source
from ssl_vit.encoder import Encoder
from ssl_vit.evaluators.backbone import open_backbone, result_file
from ssl_vit.evaluators.features import View, ready
from ssl_vit.evaluators.watch import bounded
from ssl_vit.figures import save_png, to_rgb
from ssl_vit.training.parallel import resolve_device

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.visualize"
_BATCH = 8


@dataclass(frozen=True)
class AttentionConfig:
    """What the [CLS] token attends to in the last block, head by head."""

    config: str = ""
    """A YAML file of these options. The command line wins."""
    encoder: str = ""
    """A run folder or a weight file of any kind that evaluate takes. random: before it: the same
    architecture with random weights."""
    images: tuple[str, ...] = ()
    """Image files, or one source named as for pretraining: digits:val, folder:PATH, tar:..."""
    count: int = 8
    """How many images of a source are shown, a seeded choice. Files are all shown."""
    size: tuple[int, ...] = ()
    """Height and width in pixels, or one number for both, that images are brought to; divisible
    by the patch size. Positions are resampled. Empty: the size the encoder is made for."""
    mass: float = 0.6
    """Share of the attention to patches that the shown sets of patches hold."""
    out: str = ""
    """PNG file. Empty: attention-images.png in the run folder, or beside the encoder file."""
    seed: int = 0
    """For the choice of images, and the random encoder."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""

    def __post_init__(self) -> None:
        check(self.count >= 1, f"--count is {self.count}; at least 1")
        check(0 < self.mass <= 1, f"--mass is {self.mass}; above 0, at most 1")
        size = " ".join(map(str, self.size))
        check(
            len(self.size) <= 2 and all(s > 0 for s in self.size),
            f"--size is {size}; one number of pixels or two, height and width",
        )
        out = Path(self.out).expanduser()
        check(
            not self.out or (out.suffix.lower() == ".png" and not out.is_dir()),
            f"--out is {self.out!r}; the picture is a PNG file, its name must end in .png",
        )
        check(out.parent.is_dir(), f"--out is {self.out!r}; there is no folder {str(out.parent)!r}")


_PICTURES = {"attention": AttentionConfig}


class Files(Source):
    """Image files by their paths, unlabelled."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.spec, self.paths = " ".join(paths), [Path(p).expanduser() for p in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Item:
        try:
            return self.paths[i].read_bytes(), None
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def name(self, i: int) -> str:
        return str(self.paths[i])


def find_images(given: tuple[str, ...], count: int, seed: int) -> Source:
    """An ``--images`` argument: all of the files, or at most ``count`` images of one source.

    Raises:
        UserError: nothing given, no such file, or no such source.
    """
    check(bool(given), "--images is missing; give image files, or one source such as folder:PATH")
    missing = [p for p in given if not Path(p).expanduser().is_file()]
    if not missing:
        return Files(given)
    if len(given) == 1:
        try:
            return bounded(open_source(given[0]), count, seed)
        except UserError as error:
            also = "" if ":" in given[0] else "; nor is there such a file"
            raise UserError(f"--images: {error}{also}") from None
    raise UserError(f"--images: {missing[0]!r} is no such file; give files, or one source alone")


def read_images(source: Source, view: View) -> Tensor:
    """The images (b, c, h, w), prepared as for evaluation but not normalised.

    An unreadable image of a source is named in the log and left out; a file that was asked for
    by name is not.

    Raises:
        UserError: such a file, or all of a source, cannot be read.
    """
    images = EvalImages(source, view.size, view.crop_ratio, view.channels)
    batch = images.__getitems__(range(len(source)))
    reasons = list(batch.bad.values())
    if reasons and (isinstance(source, Files) or not batch.views.crops):
        raise UserError(f"--images: {reasons[0]}")
    for reason in reasons:
        log.warning("unreadable image left out: %s", reason)
    return batch.views.crops[0]


@torch.inference_mode()
def draw_attention(encoder: Encoder, images: Tensor, view: View, mass: float) -> np.ndarray:
    """The attention panel of images (b, c, h, w) as read, with the encoder on its device."""
    device = next(encoder.parameters()).device
    normalize, display = Normalize(view.mean, view.std).to(device), view.display(images)
    shown, maps, grid = [], [], encoder.grid
    for part in images.split(_BATCH):
        ready_made = normalize.images(part.to(device))
        attention, grid = cls_attention(encoder, ready_made)
        maps.append(attention.cpu())
        shown.append(to_rgb(display.inverse(ready_made.cpu())))
    return attention_panel(np.concatenate(shown), torch.cat(maps), grid, mass)


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    name = subcommand(argv, _PROG, "picture", list(_PICTURES))
    configs, flags = split_config(argv[1:])
    kind = _PICTURES[name]
    files = [find_recipe(c) for c in configs]
    config = layered(kind(), files, flags, f"{_PROG} {name}", kind.__doc__ or "", kind)
    check(bool(config.encoder), "--encoder is missing")
    source = find_images(config.images, config.count, config.seed)
    device = resolve_device(config.device)
    backbone = open_backbone(config.encoder, config.seed, config.size)
    encoder, view = backbone.module, backbone.view
    check(isinstance(encoder, Encoder), f"--encoder is {config.encoder!r}; a ViT is needed")
    assert isinstance(encoder, Encoder)
    images = read_images(source, view)
    ready(encoder, device)
    picture = draw_attention(encoder, images, view, config.mass)
    out = result_file(config.out, backbone, f"{name}-images.png")
    save_png(out, picture)
    print(f"{name} of {len(images)} images: {out}")
    return 0


if __name__ == "__main__":
    run_door(main)
