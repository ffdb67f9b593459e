"""Reconstruction: whole methods that predict masked patches, opened from runs and files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.commands.initial_weights import whole_method
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.figures import picture_rows
from ssl_vit.common.seeds import fold
from ssl_vit.data.normalize import Normalize
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.methods import method_names
from ssl_vit.methods.base import Method, find_method
from ssl_vit.model.encoder import Encoder
from ssl_vit.options.base import Target
from ssl_vit.training.run_files import CONFIG_FILE
from ssl_vit.weights.own_files import ENCODER_FILE

log = logging.getLogger("ssl_vit")


def reconstructing() -> list[str]:
    """The methods that reconstruct images."""
    return [name for name in method_names() if find_method(name).reconstructs]


def _have_one() -> str:
    names = reconstructing()
    kinds = [kind for kind in map(find_method, names) if "from_file" in vars(kind)]
    return (
        f"a decoder is in a run folder of pretrain {' or '.join(names)}, beside its checkpoints, "
        f"in an official {' or '.join(kind.title for kind in kinds)} pretraining file with "
        "decoder_ tensors, or in a Hugging Face ViTMAEForPreTraining folder"
    )


def open_reconstruction(backbone: Backbone, size: tuple[int, int]) -> Method:
    """The whole method that an opened encoder is a part of, in evaluation mode.

    Args:
        size: of the images in pixels; positions are resampled if it is another.

    Raises:
        UserError: there is no decoder, or not all of one.
    """
    file = Path(backbone.identity.get("file", ""))
    encoder = backbone.module
    kind = backbone.name.partition(":")[0]
    check(
        isinstance(encoder, Encoder) and kind not in ("random", "pixels", "timm"),
        f"--encoder is {backbone.name!r}, which has no decoder to reconstruct images with; "
        f"{_have_one()}",
    )
    assert isinstance(encoder, Encoder)
    ours = backbone.identity["format"] == "ssl_vit"
    found = _of_run(backbone, file) if ours else _of_file(backbone, file, encoder)
    return found.for_size(size).eval()


def _of_run(backbone: Backbone, file: Path) -> Method:
    """The method of a run here, from its newest whole checkpoint."""
    name, folder = backbone.info.method if backbone.info else "", file.parent
    given = f"--encoder is {backbone.name!r}"
    if name not in reconstructing():
        own = f"trained by {name}, which" if name in method_names() else "an encoder alone: it"
        raise UserError(f"{given}, {own} has no decoder; {_have_one()}")
    whole = whole_method(folder) if file.name == ENCODER_FILE else None
    if whole is None:
        alone = f"an encoder alone: there are no checkpoints with a {CONFIG_FILE} beside it"
        raise UserError(f"{given}, {alone}; {_have_one()}")
    return whole


def _of_file(backbone: Backbone, file: Path, encoder: Encoder) -> Method:
    """The method of another library's file."""
    for name in reconstructing():
        found = find_method(name).from_file(file, encoder)
        if found is not None:
            return found
    raise UserError(
        f"--encoder is {backbone.name!r}, an encoder alone, without a decoder to reconstruct "
        f"images with; {_have_one()}"
    )


def mask_keys(count: int, seed: int) -> Int64[Tensor, " b"]:
    """Keys that the masks of so many images are drawn from: functions of the seed."""
    return torch.tensor([fold(seed, i) for i in range(count)])


def reconstruction_panel(
    method: Method,
    images: Float[Tensor, "b c h w"],
    display: Normalize,
    mask_ratio: float = 0.0,
    target: Target = "auto",
    seed: int = 0,
    missing: Bool[Tensor, "b c h w"] | None = None,
) -> Any:
    """Original, masked image, prediction and reconstruction of normalised images, one row each:
    (height, width, 3) uint8. Arguments are those of ``Method.reconstruct``."""
    keys = mask_keys(len(images), seed).to(images.device)
    found = method.reconstruct(images, keys, display, mask_ratio, target, missing)
    log.info("%s", found.caption.partition(". ")[0])
    return picture_rows(found.pictures, found.caption)
