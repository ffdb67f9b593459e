"""Whole masked autoencoders, with their decoders, from runs and files; what they see of images."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ssl_vit.commands.cli import layered
from ssl_vit.commands.pretraining import PretrainConfig, default_options
from ssl_vit.common.config import EncoderConfig, check
from ssl_vit.common.figures import picture_rows
from ssl_vit.common.seeds import fold, uniform
from ssl_vit.data.augment import Normalize
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.methods.base import find_method, method_names
from ssl_vit.methods.mae import MAE, MAEConfig, patch_statistics
from ssl_vit.model.encoder import Encoder, set_norm_eps, sincos_positions, without_memory
from ssl_vit.training.checkpoint import complete
from ssl_vit.training.resume import CONFIG_FILE
from ssl_vit.training.shards import Parts, load_parts
from ssl_vit.weights.decoders import read_decoder
from ssl_vit.weights.exchange import ENCODER_FILE, load_strictly, resample_positions

log = logging.getLogger("ssl_vit")
Target = Literal["auto", "pixels", "normalized"]
_HAVE_ONE = (
    "a decoder is in a run folder of pretrain mae, beside its checkpoints, in an official MAE "
    "pretraining file with decoder_ tensors, or in a Hugging Face ViTMAEForPreTraining folder"
)


@dataclass(frozen=True)
class Autoencoder:
    """A whole MAE; ``normalized`` is its target where that is told, by ``told_by``."""

    mae: MAE
    normalized: bool | None
    told_by: str


def open_autoencoder(backbone: Backbone, mask_ratio: float, size: tuple[int, int]) -> Autoencoder:
    """The MAE that an opened encoder is a part of, in evaluation mode.

    Args:
        mask_ratio: share of the patches to hide; 0: as it was trained, else 0.75.
        size: of the images in pixels; positions are resampled if it is another.

    Raises:
        UserError: it has no decoder, or not all of one.
    """
    file = Path(backbone.identity.get("file", ""))
    encoder = backbone.module
    given = f"--encoder is {backbone.name!r}"
    kind = backbone.name.partition(":")[0]
    check(
        isinstance(encoder, Encoder) and kind not in ("random", "pixels", "timm"),
        f"{given}, which has no decoder to reconstruct images with; {_HAVE_ONE}",
    )
    assert isinstance(encoder, Encoder)
    if backbone.identity["format"] == "ssl_vit":
        found = _of_run(backbone, file)
    else:
        found = _of_file(backbone, file, encoder)
    ratio = mask_ratio or found.mae.config.mask_ratio
    n = size[0] * size[1] // encoder.patch_size**2
    visible = int(n * (1 - ratio))
    check(
        1 <= visible < n,
        f"--mask-ratio is {ratio}; of {n} patches it leaves {visible} visible, and at least 1 "
        "must be visible and 1 masked",
    )
    mae = _resized(found.mae, size).eval()
    mae.config, mae.n_visible = replace(mae.config, mask_ratio=ratio), visible
    return replace(found, mae=mae)


def _of_run(backbone: Backbone, file: Path) -> Autoencoder:
    """The MAE of a run here, from its newest whole checkpoint."""
    method, folder = backbone.info.method if backbone.info else "", file.parent
    given = f"--encoder is {backbone.name!r}"
    if method != "mae":
        own = f"trained by {method}, which" if method in method_names() else "an encoder alone: it"
        check(False, f"{given}, {own} has no decoder; {_HAVE_ONE}")
    found = complete(folder / "checkpoints")
    whole = file.name == ENCODER_FILE and bool(found) and (folder / CONFIG_FILE).is_file()
    check(
        whole,
        f"{given}, an encoder alone: there are no checkpoints with a {CONFIG_FILE} beside it; "
        f"{_HAVE_ONE}",
    )
    method_class = find_method("mae")
    kind = PretrainConfig[method_class.Config]  # type: ignore[name-defined]
    default = default_options(PretrainConfig, method_class)
    options: PretrainConfig[Any] = layered(default, [folder / CONFIG_FILE], [], "", "", kind)
    config: MAEConfig = options.method
    mae = _blank(config, options.encoder, options.data.channels)
    parts = Parts(sorted(found[-1].glob("task*.safetensors")))
    log.info("%s: encoder and decoder, %s", found[-1], load_parts(mae, parts))
    return Autoencoder(mae, config.normalize_target, f"normalize_target in its {CONFIG_FILE}")


def _of_file(backbone: Backbone, file: Path, encoder: Encoder) -> Autoencoder:
    """The MAE of another library's file."""
    decoder = read_decoder(file)
    check(
        decoder is not None,
        f"--encoder is {backbone.name!r}, an encoder alone, without a decoder to reconstruct "
        f"images with; {_HAVE_ONE}",
    )
    assert decoder is not None
    config = MAEConfig(
        mask_ratio=decoder.mask_ratio or 0.75,
        normalize_target=decoder.normalized is not False,
        decoder_width=decoder.width,
        decoder_depth=decoder.depth,
        decoder_heads=decoder.heads,
    )
    mae = _blank(config, encoder.config, encoder.channels)
    load_strictly(mae.encoder.vit, encoder.vit.state_dict(), str(file))
    said = load_strictly(mae.decoder, decoder.state, f"{file}, decoder")
    log.info("%s: decoder of %s, %s", file, decoder.format, said)
    own = mae.decoder.positions
    check(
        decoder.positions.shape == own.shape,
        f"{file}: decoder_pos_embed has {len(decoder.positions)} patches; there are {len(own)}",
    )
    mae.decoder.positions = decoder.positions
    set_norm_eps(mae.decoder, decoder.norm_eps)
    return Autoencoder(mae, decoder.normalized, decoder.known_from)


def _blank(config: MAEConfig, encoder: EncoderConfig, channels: int) -> MAE:
    """An MAE on the CPU whose weights are still to be loaded; drawing them would take time.

    Raises:
        UserError: of its patches none would be visible, or none masked.
    """
    with without_memory():
        mae = MAE(config, encoder, channels)
    mae.to_empty(device="cpu")
    mae.decoder.positions = sincos_positions(mae.encoder.grid, config.decoder_width)
    return mae


def _resized(mae: MAE, size: tuple[int, int]) -> MAE:
    """The same MAE for images of another size, all of its positions resampled bicubically."""
    old = mae.encoder
    if size == old.image_size:
        return mae
    made = _blank(mae.config, replace(old.config, image_size=size), old.channels)
    made.encoder.load_state_dict(
        {
            f"vit.{k}": v
            for k, v in resample_positions(old.vit.state_dict(), old, made.encoder).items()
        }
    )
    made.decoder.load_state_dict(mae.decoder.state_dict())
    set_norm_eps(made.decoder, mae.decoder.norm.eps)
    made.decoder.positions = resample_abs_pos_embed(
        mae.decoder.positions[None],
        list(made.encoder.grid),
        old_size=list(old.grid),
        num_prefix_tokens=0,
    )[0]
    return made


def masks(count: int, patches: int, seed: int) -> Float[Tensor, "b n"]:
    """The numbers that decide which patches of each image are seen: functions of the seed."""
    return uniform(torch.tensor([fold(seed, i) for i in range(count)]), patches)


@torch.inference_mode()
def explained(
    mae: MAE, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]
) -> dict[str, float]:
    """The share of the masked patches' target that a prediction explains, for each target.

    ``pixels`` and ``normalized``: 1 - (mean squared error) / (mean square about the target's mean),
    as if the decoder had been trained on that. One of another target explains nothing: less than 0.
    """
    prediction, mask = mae.predict(images, noise)
    hidden = mask > 0
    patches = mae.encoder.patchify(images)
    mean, std = patch_statistics(patches)
    targets = {"pixels": patches, "normalized": (patches - mean) / std}
    shares = {}
    for name, target in targets.items():
        wanted, given = target[hidden].double(), prediction[hidden].double()
        about_mean = (wanted - wanted.mean()).square().mean().clamp(min=1e-12)
        shares[name] = 1 - float((given - wanted).square().mean() / about_mean)
    return shares


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0 else "nothing"


def reconstruction_panel(
    found: Autoencoder,
    images: Float[Tensor, "b c h w"],
    display: Normalize,
    target: Target = "auto",
    seed: int = 0,
) -> np.ndarray:
    """Original, masked image, prediction and reconstruction of normalised images, one row each.

    Args:
        display: its inverse shows the images.
        target: what the decoder predicts; auto: what is told of it, else the one of the two by
            which it explains more of these very images' masked patches.
    """
    mae = found.mae
    n = mae.encoder.grid[0] * mae.encoder.grid[1]
    noise = masks(len(images), n, seed).to(images.device)
    normalized, why = target == "normalized", f"as --target {target} says"
    if target == "auto" and found.normalized is not None:
        normalized, why = found.normalized, f"as {found.told_by} says"
    elif target == "auto":
        shares = explained(mae, images, noise)
        normalized = shares["normalized"] >= shares["pixels"]
        why = (
            "nothing in the file tells, so it was decided by these images: of their masked patches "
            f"the prediction explains {_percent(shares['normalized'])} as normalised patches and "
            f"{_percent(shares['pixels'])} as raw pixels"
        )
    mae.config = replace(mae.config, normalize_target=normalized)
    log.info("%s (%s)", mae.target_shown, why)
    columns = mae.pictures(images, noise, display)
    caption = (
        f"{mae.target_shown} ({why}). {n - mae.n_visible} of {n} patches are masked. "
        "prediction: all patches as predicted, of which training knows the masked ones only; "
        "reconstruction: the visible patches as they are, the masked ones as predicted."
    )
    return picture_rows(columns, caption)
