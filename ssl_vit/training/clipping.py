"""Gradient clipping: by the norm of all gradients, of each, or of each network's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import compress

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssl_vit.common.config import OptimConfig
from ssl_vit.common.distributed import local

_LOOPS = ("cpu",)  # devices whose kernels for many tensors are loops
# Numbers of a gradient up to which its factor is spread to it: 256 KiB of float32.
_SPREAD = 1 << 16


def clip_gradients(
    parameters: list[nn.Parameter], config: OptimConfig, networks: Sequence[str] = ()
) -> Tensor:
    """Clip gradients as configured; returns the global norm before clipping, on the device.

    Of sharded parameters each process holds its rows; norms are of the whole tensors. ``networks``:
    the network of each parameter, for clipping by network.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    gradients = [local(g) for g in found]
    norms = torch.stack(torch._foreach_norm(gradients))
    if isinstance(found[0], DTensor):
        squares = norms.square()
        dist.all_reduce(squares)
        norms = squares.sqrt()
    total = norms.norm()
    if config.clip <= 0:
        return total
    if config.clip_by == "parameter":
        multiply_each(gradients, _factors(norms, config.clip))
    elif config.clip_by == "network":
        names = tuple(compress(networks, (p.grad is not None for p in parameters)))
        same = _same(names, norms.device, norms.dtype)
        factors = _factors((same @ norms.square()).sqrt(), config.clip)
        for name in dict.fromkeys(names):
            own = [gradient for gradient, of in zip(gradients, names, strict=True) if of == name]
            torch._foreach_mul_(own, factors[names.index(name)])
    else:
        torch._foreach_mul_(gradients, _factors(total, config.clip))
    return total


def multiply_each(gradients: list[Tensor], factors: Float[Tensor, " n"]) -> None:
    """Multiply each gradient by a factor of its own, in place.

    With lists of tensors torch's kernels for many at once want pairs of equal shapes, and start one
    for each pair otherwise. So on GPUs the factors of all gradients of one shape are spread to it,
    but for large ones, where to write and read them again costs more than a start.
    """
    each = factors.unbind()
    if factors.device.type in _LOOPS:
        torch._foreach_mul_(gradients, list(each))
        return
    shapes: dict[torch.Size, list[int]] = {}
    for i, gradient in enumerate(gradients):
        shapes.setdefault(gradient.shape, []).append(i)
    ordered = torch.stack([each[i] for places in shapes.values() for i in places])
    counts = [len(places) for places in shapes.values()]
    for (shape, places), own in zip(shapes.items(), ordered.split(counts), strict=True):
        if len(places) == 1 or shape.numel() > _SPREAD:
            for i, factor in zip(places, own.unbind(), strict=True):
                gradients[i].mul_(factor)
            continue
        spread = own.view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()
        torch._foreach_mul_([gradients[i] for i in places], list(spread.unbind()))


def _factors(norms: Tensor, clip: float) -> Tensor:
    return (clip / (norms + 1e-6)).clamp(max=1.0)


@lru_cache(maxsize=4)
def _same(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, n): 1 where two names are the same."""
    return torch.tensor([[a == b for b in names] for a in names], device=device, dtype=dtype)
