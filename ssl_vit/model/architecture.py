"""Architectures: the arguments of timm's models, what can be built, shapes without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.overrides import TorchFunctionMode

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import check, did_you_mean
from ssl_vit.model.stem import ConvEmbed


def timm_kwargs(config: EncoderConfig, channels: int = 3) -> dict[str, Any]:
    """Arguments of ``timm.create_model(config.arch, num_classes=0, ...)`` for the same weights.

    It can be written as JSON, and so leaves out ``config.norm_eps``, :func:`set_norm_eps` after it,
    and ``config.stem``, :func:`stem_option`.
    """
    kwargs: dict[str, Any] = {}
    if channels != 3:
        kwargs["in_chans"] = channels
    if config.image_size:
        size = config.image_size
        kwargs["img_size"] = size[0] if len(size) == 1 else list(size)
    names = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth"}
    names |= {"heads": "num_heads", "layer_scale": "init_values"}
    for ours, theirs in names.items():
        if getattr(config, ours):
            kwargs[theirs] = getattr(config, ours)
    rotary = config.arch in rotary_architectures()
    if config.registers >= 0:
        kwargs["num_reg_tokens" if rotary else "reg_tokens"] = config.registers
    if rotary and len(config.rope_periods) == 1 and config.rope_periods != (100.0,):
        kwargs["rope_temperature"] = config.rope_periods[0]
    if config.norm == "pooled":
        kwargs |= {"global_pool": "avg", "use_fc_norm" if rotary else "fc_norm": True}
    return kwargs


def plain_architectures() -> list[str]:
    """Names of timm's plain ViTs with positions that are added."""
    return timm.list_models(module="vision_transformer")


def rotary_architectures() -> list[str]:
    """Names of timm's ViTs of DINOv3, with rotary positions."""
    return timm.list_models("*_dinov3*", module="eva")


def set_norm_eps(module: nn.Module, eps: float) -> None:
    """Give every LayerNorm of a module the same epsilon."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps


def check_sizes(config: EncoderConfig, kwargs: dict[str, Any]) -> None:
    """Refuse, before any memory is taken, what cannot be built, saying which option is at fault."""
    known = plain_architectures() + rotary_architectures()
    check(
        config.arch in known,
        f"--encoder.arch is {config.arch!r}; it must be a plain ViT of timm"
        f"{did_you_mean(config.arch, known)}",
    )
    with without_memory():
        pooling = {
            k: v for k, v in kwargs.items() if k in ("global_pool", "fc_norm", "use_fc_norm")
        }
        vit: Any = timm.create_model(config.arch, num_classes=0, depth=1, **pooling)
    rotary = type(vit) is Eva and type(vit.blocks[0]) is EvaBlock and vit.pos_embed is None
    plain = type(vit) is VisionTransformer and vit.pos_embed is not None
    plain = (plain or rotary) and type(vit.patch_embed) is PatchEmbed
    plain = plain and hasattr(vit.blocks[0], "attn")  # parallel blocks have theirs elsewhere
    # A norm after the pooling leaves the patch tokens without one: only where that is asked for.
    pooled = not isinstance(vit.fc_norm, nn.Identity)
    normed = config.norm if config.norm == "tokens" else "pooled features"
    check(
        plain and pooled == (config.norm == "pooled"),
        f"--encoder.arch is {config.arch!r}; it must be a plain ViT with absolute positions, or "
        f"DINOv3's, and a final norm on its {normed}",
    )
    patch = kwargs.get("patch_size", vit.patch_embed.patch_size[0])
    size = config.image_size or vit.patch_embed.img_size
    check(
        all(s > 0 and s % patch == 0 for s in size),
        f"--encoder.image-size is {'x'.join(map(str, size))}; "
        f"it must be divisible by the patch size, {patch}",
    )
    heads = kwargs.get("num_heads", vit.blocks[0].attn.num_heads)
    width = kwargs.get("embed_dim", vit.embed_dim)
    if config.stem == "conv":
        _check_stem(config, patch, width, rotary)
    check(width % heads == 0, f"--encoder.heads is {heads}; it must divide the width, {width}")
    check(
        not rotary or width % (4 * heads) == 0,
        f"--encoder.heads is {heads}, of {width // heads} features each; rotary positions need a "
        "number that 4 divides",
    )
    augmented = config.rope_shift or config.rope_jitter or config.rope_rescale
    check(
        rotary or not augmented,
        f"--encoder.rope-shift, -jitter and -rescale are for rotary positions; {config.arch} has "
        "none (vit_small_patch16_dinov3 has)",
    )


def _check_stem(config: EncoderConfig, patch: int, width: int, rotary: bool) -> None:
    """Refuse what a convolutional stem does not fit."""
    check(
        patch > 1 and not patch & (patch - 1) and width % (patch // 2) == 0,
        f"--encoder.stem is conv, the patch size {patch} and the width {width}; the patch size "
        "must be a power of 2, half of which divides the width",
    )
    check(
        not rotary,
        f"--encoder.stem is conv; {config.arch}, with rotary positions, has patches alone",
    )


def stem_option(stem: str) -> dict[str, Any]:
    """Argument of ``timm.create_model`` for a stem; it cannot be written as JSON."""
    return {"embed_layer": ConvEmbed} if stem == "conv" else {}


# What initial values are made by: without memory, seconds for nothing.
_FILLS = {"add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_"}
_FILLS |= {"uniform_", "zero_"}


class _ShapesOnly(TorchFunctionMode):
    """Leaves out initial values, which tensors of the meta device have no place for.

    Keeps ``linspace`` on the CPU, from which older timm reads the rates of stochastic depth.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        tensor = args[0] if args else kwargs.get("tensor")
        if _initialises(func) and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


def _initialises(func: Any) -> bool:
    if getattr(func, "__module__", "") == nn.init.__name__:
        return True
    return not torch.is_grad_enabled() and getattr(func, "__name__", "") in _FILLS


@contextmanager
def without_memory() -> Iterator[None]:
    """Context in which modules are built with shapes only, on the meta device; it takes no time."""
    with torch.device("meta"), _ShapesOnly():
        yield


def take_memory(module: nn.Module) -> None:
    """Give a module built :func:`without_memory` memory on the CPU; its weights are to be loaded.

    What is in no state dict (timm's own tables of rotary positions, the zero bias of keys) is
    computed: our encoder needs none of it, timm's own ``forward`` does.
    """
    module.to_empty(device="cpu")
    for part in module.modules():
        fill = getattr(part, "init_non_persistent_buffers", None)
        if fill is not None:
            fill()
