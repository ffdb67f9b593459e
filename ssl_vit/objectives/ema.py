"""Teacher: a copy of a student whose weights are the moving average of the student's."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ssl_vit.common.distributed import local
from ssl_vit.model.encoder import Encoder


class Teacher(nn.Module):
    """An encoder and a head that follow a student's by exponential moving average.

    It begins equal to the student, whose first weights are drawn by then, gets no gradient, and has
    no stochastic depth, and coordinates (RoPE) that training does not change. ``head``: of the
    student; None: the encoder alone is followed.
    """

    def __init__(self, encoder: Encoder, head: nn.Module | None = None) -> None:
        super().__init__()
        config = replace(encoder.config, drop_path=0.0)
        self.encoder = Encoder(config, encoder.channels)
        self.encoder.augmented = False
        self.head = nn.Identity() if head is None else copy.deepcopy(head)
        self.start_from(encoder)
        self.requires_grad_(False)

    def start_from(self, encoder: Encoder) -> None:
        """Take the student's encoder as it is now."""
        self.encoder.load_state_dict(encoder.state_dict(), strict=True)

    def follow(
        self, encoder: Encoder, head: nn.Module | None, momentum: float, took: Bool[Tensor, ""]
    ) -> None:
        """Move towards the student, keeping the share ``momentum``; not at all unless ``took``."""
        ema_update(self.encoder, encoder, momentum, took)
        if head is not None:
            ema_update(self.head, head, momentum, took)


@torch.no_grad()
def ema_update(
    average: nn.Module, source: nn.Module, momentum: float, took: Bool[Tensor, ""]
) -> None:
    """``average <- momentum * average + (1 - momentum) * source``, where ``took``; else nothing.

    Both have the same parameters in the same order, sharded alike if they are. The host does not
    wait for ``took``.
    """
    old = [local(p) for p in average.parameters()]
    new = [local(p) for p in source.parameters()]
    if took.device.type != "cpu":
        move_where(old, new, 1 - momentum, took)
    elif took:  # reading it waits for nothing here
        torch._foreach_lerp_(old, new, 1 - momentum)


@torch.no_grad()
def copy_weights(to: nn.Module, source: nn.Module) -> None:
    """Copy all parameters of a network to another one like it, sharded alike if they are."""
    own = [local(p) for p in to.parameters()]
    torch._foreach_copy_(own, [local(p) for p in source.parameters()])


@torch.no_grad()
def move_where(old: list[Tensor], new: list[Tensor], share: float, took: Bool[Tensor, ""]) -> None:
    """Move each old tensor this share of the way to its new one, or not at all."""
    step = torch._foreach_sub(new, old)
    torch._foreach_mul_(step, share * took)
    torch._foreach_add_(old, step)
