"""Pretrained timm weights, by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torch.hub import get_dir

from ssl_vit.common.errors import UserError, check, did_you_mean
from ssl_vit.model.architecture import plain_architectures, rotary_architectures, without_memory
from ssl_vit.weights.reading import Statistics, one_line

_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def architecture(name: str) -> str:
    """Architecture in a name of timm weights, ``ARCHITECTURE`` or ``ARCHITECTURE.TAG``.

    Raises:
        UserError: not a plain ViT of timm, or an unknown tag.
    """
    arch = name.partition(".")[0]
    known = plain_architectures() + rotary_architectures()
    message = f"timm:{name}: {arch!r} is not a plain ViT of timm{did_you_mean(arch, known)}"
    check(is_plain(arch), message)
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"timm:{name}: {one_line(error)}") from None
    return arch


def is_plain(arch: str) -> bool:
    """True for the name of a plain ViT of timm, or of a DINOv3."""
    return arch in plain_architectures() + rotary_architectures()


def pixel_statistics(name: str) -> Statistics | None:
    """Pixel statistics (mean, standard deviation) used to train the weights of this name."""
    config = timm.get_pretrained_cfg(name)
    return (tuple(config.mean), tuple(config.std)) if config else None


def shapes(name: str) -> dict[str, Tensor]:
    """State dict of a timm model on the meta device: shapes without values."""
    with without_memory():
        return dict(timm.create_model(name).state_dict())


def downloaded(name: str) -> tuple[dict[str, Tensor], Path]:
    """Load timm's weights of this name, from its cache or the network, and return their file.

    Raises:
        UserError: there are none, or they cannot be loaded.
    """
    check(timm.is_model_pretrained(name), f"timm:{name}: timm has no weights of that name")
    try:
        with tensors_only():
            model = timm.create_model(name, pretrained=True)
            config: Any = model.pretrained_cfg
    except Exception as error:  # of the network, the hub, the disk or the file
        raise UserError(f"timm:{name}: its weights cannot be loaded: {one_line(error)}") from None
    return dict(model.state_dict()), _cached(name, config)


def _cached(name: str, config: dict[str, Any]) -> Path:
    """Path in timm's cache of the file just loaded."""
    files = [config.get("hf_hub_filename") or "", *_HUB_FILES]
    for file in files if config.get("hf_hub_id") else []:
        found = try_to_load_from_cache(config["hf_hub_id"], file) if file else None
        if isinstance(found, str):
            return Path(found)
    path = Path(get_dir()) / "checkpoints" / str(config.get("url") or "").rpartition("/")[2]
    check(path.is_file(), f"timm:{name}: its weights are not in timm's cache at {path}")
    return path


@contextmanager
def tensors_only() -> Iterator[None]:
    """Context manager: ``torch.load``, also within timm, refuses pickles that could execute."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
