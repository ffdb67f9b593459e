"""Peers: training steps of other implementations, with the same images and sizes as ours."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssl_vit.benchmarks.side import Side, Workload
from ssl_vit.benchmarks.speed import random_batch, single_views
from ssl_vit.common.errors import UserError, check, did_you_mean
from ssl_vit.data.normalize import Normalize
from ssl_vit.model.architecture import timm_kwargs, without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.objectives.base import Objective
from ssl_vit.training.parallel import autocast

NONE = "none"


def peers_of(method: str, what: str) -> dict[str, Any]:
    """``PEERS`` (steps) or ``CHAINS`` (loaders) of a method by name, which
    ``benchmarks/peers_<method>.py`` holds; empty where there is no such file."""
    name = f"{__name__}_{method}"
    return getattr(import_module(name), what) if find_spec(name) else {}


def peer_names(against: str, allowed: Collection[str], where: str) -> list[str]:
    """Peer names in ``--against``, separated by commas, without repetition.

    Args:
        where: benchmark and method, for the error.

    Raises:
        UserError: a name that is not allowed.
    """
    names = [name.strip() for name in against.split(",")]
    known = ", ".join(allowed) or "none"
    for name in names:
        check(
            name in allowed or names in ([NONE], [""]),
            f"--against is {name!r}; allowed for {where}: {known}{did_you_mean(name, allowed)}",
        )
    return [] if names in ([NONE], [""]) else list(dict.fromkeys(names))


class Peer(Side):
    """Peer: a training step of another implementation's unmodified modules.

    The optimizer is fused AdamW, without weight decay for biases and other vectors. A subclass
    builds its networks in ``__init__``, calls ``begin`` at the end, and defines ``loss``.
    """

    networks: Any
    trained: list[nn.Parameter]

    def begin(self, networks: nn.Module) -> None:
        """Setup of the networks, trained where they require gradients, the optimizer, the batch."""
        work = self.work
        self.networks = networks.to(work.device).train()
        self.trained = [p for p in self.networks.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in self.trained if (p.ndim > 1) == decays],
                "weight_decay": work.optim.weight_decay if decays else 0.0,
                "decays": decays,
                "lr_scale": 1.0,
                "encoder": False,
            }
            for decays in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=work.optim.peak_lr, betas=work.optim.betas, fused=True
        )
        batch = random_batch(work.spec, work.batch_size, work.channels, work.seed)
        self.views = single_views(batch, work.spec, Normalize(*work.statistics).to(work.device))

    def loss(self, views: list[Tensor]) -> Tensor:
        """Loss of normalised views (B, C, h, w), crops of the first kind first."""
        raise NotImplementedError

    def vits(self) -> list[Any]:
        """Encoders of the peer that are timm's ViTs, the evaluated one last; empty if it has
        none."""
        return []

    def at(self, objective: Objective, step: int) -> None:
        """Scheduled values of the method at a step, other than learning rate and weight decay."""

    def clip(self) -> None:
        """Gradient clipping, after the backward pass."""

    def move_teacher(self) -> None:
        """Teacher update, after the optimizer step."""

    def learn(self, views: list[Tensor]) -> Tensor:
        """One optimizer step on given views; returns the loss, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.work.device, self.work.precision):
            loss = self.loss(views)
        loss.backward()
        self.clip()
        self.optimizer.step()
        self.move_teacher()
        return loss.detach()

    def step(self) -> Tensor:
        """One optimizer step on the batch of noise; returns the loss."""
        return self.learn(self.views)

    def parameters(self) -> int:
        """Number of parameters of all networks, trained or not."""
        return sum(p.numel() for p in self.networks.parameters())


def library(peer: str, name: str, *parts: str) -> list[Any]:
    """Modules of an optional library that a peer needs.

    Raises:
        UserError: the library is not installed, or lacks them.
    """
    try:
        return [import_module(f"{name}.{part}" if part else name) for part in parts]
    except ImportError as error:
        raise UserError(
            f"--against {peer} needs {name} ({error}); install it: pip install 'ssl_vit[bench]'"
        ) from None


def timm_vit(work: Workload, **more: Any) -> Any:
    """timm ViT of the encoder's architecture, with timm's default attention."""
    kwargs = timm_kwargs(work.encoder, work.channels)
    return timm.create_model(work.encoder.arch, num_classes=0, **kwargs, **more)


def check_plain(work: Workload, who: str, square: bool = True) -> Encoder:
    """Encoder without weights, checked to be an architecture that the peer supports.

    Raises:
        UserError: the peer does not support it.
    """
    with without_memory():
        encoder = Encoder(work.encoder, work.channels)
    vit = encoder.vit
    obstacles = {
        "rotary positions": encoder.rotary,
        "a convolutional stem": work.encoder.stem == "conv",
        "no [CLS], or registers": vit.cls_token is None or vit.num_prefix_tokens != 1,
        "another epsilon in its norms": work.encoder.norm_eps != 0,
        "a norm after the pooling": work.encoder.norm == "pooled",
        "images that are not square": square and len(set(encoder.image_size)) > 1,
    }
    for what, there in obstacles.items():
        check(not there, f"--against {who}: the encoder has {what}, which {who} does not support")
    return encoder


def check_rotary(work: Workload, who: str) -> Encoder:
    """Encoder without weights, checked to have rotary positions: for others there are other peers.

    Raises:
        UserError: it has not, or other coordinates than DINOv3's.
    """
    with without_memory():
        encoder = Encoder(work.encoder, work.channels)
    plain = work.encoder.rope_coords == "separate" and work.encoder.rope_periods == (100.0,)
    check(
        encoder.rotary and plain and work.encoder.norm == "tokens",
        f"--against {who} is for encoders of DINOv3 as released (--encoder.arch "
        f"vit_small_patch16_dinov3); this is {work.encoder.arch}",
    )
    return encoder
