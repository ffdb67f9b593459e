"""The exponential moving average of one module's weights in another's."""

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ssl_vit.common.distributed import local


@torch.no_grad()
def ema_update(
    average: nn.Module, source: nn.Module, momentum: float, moves: Bool[Tensor, ""]
) -> None:
    """``average <- momentum * average + (1 - momentum) * source``, where ``moves``; else nothing.

    Both have the same parameters in the same order, sharded alike if they are. The host does not
    wait for ``moves``.
    """
    old = [local(p) for p in average.parameters()]
    new = [local(p) for p in source.parameters()]
    if moves.device.type != "cpu":
        move_where(old, new, 1 - momentum, moves)
    elif moves:  # reading it waits for nothing here
        torch._foreach_lerp_(old, new, 1 - momentum)


@torch.no_grad()
def move_where(old: list[Tensor], new: list[Tensor], share: float, moves: Bool[Tensor, ""]) -> None:
    """Move each old tensor this share of the way to its new one, or not at all."""
    step = torch._foreach_sub(new, old)
    torch._foreach_mul_(step, share * moves)
    torch._foreach_add_(old, step)
