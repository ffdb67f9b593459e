"""What others do with the same images and sizes: which of them there are for which method."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssl_vit.benchmarks.side import Side, Work
from ssl_vit.benchmarks.speed import random_batch, single_views
from ssl_vit.common.config import UserError, check, did_you_mean
from ssl_vit.data.augment import Normalize
from ssl_vit.model.encoder import Encoder, timm_kwargs, without_memory
from ssl_vit.training.parallel import autocast

NONE = "none"


def peers_of(method: str, what: str) -> dict[str, Any]:
    """``PEERS`` (steps) or ``CHAINS`` (loaders) of a method by name, which
    ``benchmarks/peers_<method>.py`` holds; empty where there is no such file."""
    name = f"{__name__}_{method}"
    return getattr(import_module(name), what) if find_spec(name) else {}


def peer_names(against: str, allowed: Collection[str], where: str) -> list[str]:
    """The names in ``--against``, separated by commas, each once.

    Args:
        where: what is measured, of which method, for the error.

    Raises:
        UserError: a name that is not allowed.
    """
    names = [name.strip() for name in against.split(",")]
    known = ", ".join(allowed) or "nothing yet"
    for name in names:
        check(
            name in allowed or names in ([NONE], [""]),
            f"--against names {name!r}; for {where} there is {known}{did_you_mean(name, allowed)}",
        )
    return [] if names in ([NONE], [""]) else list(dict.fromkeys(names))


class Peer(Side):
    """A step made of others' modules, as they come; AdamW fused, for all weights alike.

    A subclass makes its networks in ``__init__``, ends with ``begin``, and says what the loss is.
    """

    networks: Any
    trained: list[nn.Parameter]

    def begin(self, networks: nn.Module) -> None:
        """Take networks, trained where they require gradients, and the batch."""
        work = self.work
        self.networks = networks.to(work.device).train()
        self.trained = [p for p in self.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=work.optim.peak_lr, betas=work.optim.betas, fused=True
        )
        batch = random_batch(work.spec, work.batch_size, work.channels, work.seed)
        self.views = single_views(batch, work.spec, Normalize(*work.statistics).to(work.device))

    def loss(self, views: list[Tensor]) -> Tensor:
        """Of views (B, C, h, w), normalised, crops of the first kind first."""
        raise NotImplementedError

    def clip(self) -> None:
        """Called with gradients in place."""

    def move_teacher(self) -> None:
        """Called after the optimizer."""

    def learn(self, views: list[Tensor]) -> Tensor:
        """One optimizer step; the loss, which stays on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.work.device, self.work.precision):
            loss = self.loss(views)
        loss.backward()
        self.clip()
        self.optimizer.step()
        self.move_teacher()
        return loss.detach()

    def step(self) -> Tensor:
        """On the batch of noise."""
        return self.learn(self.views)

    def parameters(self) -> int:
        """Weights of all networks, those that are not trained too."""
        return sum(p.numel() for p in self.networks.parameters())


def library(peer: str, name: str, *parts: str) -> list[Any]:
    """Modules of an optional library.

    Raises:
        UserError: it is not installed, or lacks them.
    """
    try:
        return [import_module(f"{name}.{part}" if part else name) for part in parts]
    except ImportError as error:
        raise UserError(
            f"--against {peer} needs {name} ({error}); install it: pip install 'ssl_vit[bench]'"
        ) from None


def timm_vit(work: Work, **more: Any) -> Any:
    """timm's network for the encoder, with its own default attention."""
    kwargs = timm_kwargs(work.encoder, work.channels)
    return timm.create_model(work.encoder.arch, num_classes=0, **kwargs, **more)


def check_plain(work: Work, who: str, square: bool = True) -> Encoder:
    """The encoder in its sizes, without weights, if another's modules can be the same.

    Raises:
        UserError: they cannot.
    """
    with without_memory():
        encoder = Encoder(work.encoder, work.channels)
    vit = encoder.vit
    obstacles = {
        "no [CLS], or registers": vit.cls_token is None or vit.num_prefix_tokens != 1,
        "a norm after the pooling": work.encoder.norm == "pooled",
        "images that are not square": square and len(set(encoder.image_size)) > 1,
    }
    for what, there in obstacles.items():
        check(not there, f"--against {who}: the encoder has {what}, which {who} does not know")
    return encoder
