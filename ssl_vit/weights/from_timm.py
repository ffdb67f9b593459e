"""timm's own pretrained weights, by name."""

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

from ssl_vit.common.config import UserError, check, did_you_mean
from ssl_vit.model.encoder import without_memory
from ssl_vit.weights.reading import Statistics, one_line

_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def architecture(name: str) -> str:
    """The architecture in a name of timm's weights, ``ARCHITECTURE`` or ``ARCHITECTURE.TAG``.

    Raises:
        UserError: none of timm's plain ViTs, or a tag it does not know.
    """
    arch = name.partition(".")[0]
    known = timm.list_models(module="vision_transformer")
    message = f"timm:{name}: {arch!r} is no plain ViT of timm{did_you_mean(arch, known)}"
    check(arch in known, message)
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"timm:{name}: {one_line(error)}") from None
    return arch


def statistics(name: str) -> Statistics | None:
    """Mean and standard deviation of the images that weights of this name were trained on."""
    config = timm.get_pretrained_cfg(name)
    return (tuple(config.mean), tuple(config.std)) if config else None


def shapes(name: str) -> dict[str, Tensor]:
    """The state dict of such a model without its values."""
    with without_memory():
        return dict(timm.create_model(name).state_dict())


def downloaded(name: str) -> tuple[dict[str, Tensor], Path]:
    """The weights timm has under this name, from its cache or from the network, and their file.

    Raises:
        UserError: there are none, or they cannot be had.
    """
    check(timm.is_model_pretrained(name), f"timm:{name}: timm has no weights of that name")
    try:
        with tensors_only():
            model = timm.create_model(name, pretrained=True)
            config: Any = model.pretrained_cfg
    except Exception as error:  # of the network, of the hub, of the disk, of the file
        raise UserError(f"timm:{name}: its weights cannot be had: {one_line(error)}") from None
    return dict(model.state_dict()), _cached(name, config)


def _cached(name: str, config: dict[str, Any]) -> Path:
    """The file in the cache that timm has just read."""
    files = [config.get("hf_hub_filename") or "", *_HUB_FILES]
    for file in files if config.get("hf_hub_id") else []:
        found = try_to_load_from_cache(config["hf_hub_id"], file) if file else None
        if isinstance(found, str):
            return Path(found)
    path = Path(get_dir()) / "checkpoints" / str(config.get("url") or "").rpartition("/")[2]
    check(path.is_file(), f"timm:{name}: its weights are not where timm keeps them, in {path}")
    return path


@contextmanager
def tensors_only() -> Iterator[None]:
    """Have ``torch.load`` refuse, within timm too, whatever could execute."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
