"""Frozen features of whole datasets, with what a score must know of how they were made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.config import UserError
from ssl_vit.data.augment import Normalize
from ssl_vit.data.loader import EvalImages, eval_batches
from ssl_vit.data.sources import Source
from ssl_vit.encoder import Encoder, choose_attention
from ssl_vit.training.parallel import autocast, loader_workers
from ssl_vit.weights.exchange import (
    EncoderInfo,
    encoder_path,
    load_encoder,
    random_like,
    read_info,
)

log = logging.getLogger("ssl_vit")
Embed = Callable[[Float[Tensor, "b c h w"]], dict[str, Tensor]]
_PIXELS = 32


@dataclass
class FeatureSet:
    """Features by pooling, each (n, D) float32 on the CPU; labels (n,), -1 where unknown."""

    features: dict[str, Tensor]
    labels: Int64[Tensor, " n"]
    unreadable: int

    def to(self, device: torch.device) -> FeatureSet:
        """The same set on a device."""
        moved = {kind: features.to(device) for kind, features in self.features.items()}
        return FeatureSet(moved, self.labels.to(device), self.unreadable)

    def only(self, kind: str) -> FeatureSet:
        """The same set with one pooling."""
        return FeatureSet({kind: self.features[kind]}, self.labels, self.unreadable)


@dataclass(frozen=True)
class View:
    """How images are prepared for an encoder: size in pixels, channels, crop, statistics."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def crop_ratio(self) -> float:
        """Share of the short side the central crop covers: 224/256, the custom on ImageNet.

        Encoders of less than 112 pixels see the whole image: theirs are small pictures already.
        """
        return 0.875 if min(self.size) >= 112 else 1.0

    def display(self, images: Tensor) -> Normalize:
        """How to show such images: its ``inverse`` takes normalised ones to 0..1.

        8-bit images get their own values back. Of deeper ones any range is possible: shown is the
        mean +- 2.5 standard deviations.
        """
        if images.dtype == torch.uint8:
            return Normalize(self.mean, self.std)
        return Normalize((0.5,) * self.channels, (0.2,) * self.channels)


def pooled(encoder: Encoder) -> Embed:
    """An encoder as features by pooling: ``cls`` where it has one, and ``mean`` of patches."""

    def embed(images: Tensor) -> dict[str, Tensor]:
        features = encoder(images)
        kinds = ["cls", "mean"] if features.cls is not None else ["mean"]
        return {kind: features.pool(kind) for kind in kinds}

    return embed


def pixels(images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
    """The images themselves as features, averaged down to at most 32 x 32 pixels."""
    size = (min(_PIXELS, images.shape[2]), min(_PIXELS, images.shape[3]))
    return {"pixels": F.adaptive_avg_pool2d(images, size).flatten(1)}


@torch.inference_mode()
def extract(
    embed: Embed,
    source: Source,
    view: View,
    device: torch.device,
    precision: torch.dtype,
    workers: int = -1,
    batch_size: int = 256,
) -> FeatureSet:
    """Features of every readable image of ``source``, in its order.

    Raises:
        UserError: no image could be read.
    """
    normalize = Normalize(view.mean, view.std).to(device)
    images = EvalImages(source, view.size, view.crop_ratio, view.channels)
    found: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    bad: dict[int, str] = {}
    for batch in eval_batches(
        images, batch_size, loader_workers(workers, device), device.type == "cuda"
    ):
        bad |= batch.bad
        if not batch.views.crops:
            continue
        with autocast(device, precision):
            made = embed(normalize(batch.views.to(device)).crops[0])
        for kind, features in made.items():
            found.setdefault(kind, []).append(features.float().cpu())
        labels.append(batch.views.labels)
    for reason in list(bad.values())[:5]:
        log.warning("unreadable image left out: %s", reason)
    if not labels:
        raise UserError(f"no image of {source.spec} can be read: {next(iter(bad.values()), '')}")
    joined = {kind: torch.cat(parts) for kind, parts in found.items()}
    return FeatureSet(joined, torch.cat(labels), len(bad))


def open_encoder(name: str, seed: int) -> tuple[Encoder, EncoderInfo, Path]:
    """An ``--encoder`` argument as its module, its info and its file.

    A run folder or a file; ``random:`` before it means the same architecture with random weights,
    a function of ``seed``.

    Raises:
        UserError: no such file, or not an encoder.
    """
    kind, _, rest = name.partition(":")
    if kind == "random" and rest:
        path = encoder_path(rest)
        info = read_info(path)
        return random_like(info, seed), info, path
    path = encoder_path(name)
    encoder, info = load_encoder(path)
    n = len(encoder.vit.state_dict())
    log.info("%s: %d of %d tensors, %s at step %d", path, n, n, info.method, info.step)
    return encoder, info, path


def ready(module: nn.Module, device: torch.device) -> None:
    """Put an encoder on a device, in evaluation mode, with the attention that is fast there."""
    module.to(device).eval()
    choose_attention(module, device)
