"""Collectives for single-device code; without a process group they do nothing."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Local part of a tensor: this process's rows of a sharded one, in the same memory; else all.

    Gradients do not flow through it.
    """
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def rows_of(n: int, rank: int, world: int) -> slice:
    """Rows of process ``rank`` among ``n``; empty for the last processes if rows are few."""
    size = -(-n // world)
    return slice(min(n, rank * size), min(n, (rank + 1) * size))


def own_rows(tensor: Tensor) -> slice:
    """Rows of a tensor that this process holds: its part of a sharded one (FSDP2), else all."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    mesh = tensor.device_mesh
    return rows_of(len(tensor), mesh.get_local_rank(), mesh.size())


def sharded_like(tensor: Tensor, rows: Tensor) -> Tensor:
    """Tensor of which this process holds these rows, sharded as ``tensor``; where that is not
    sharded, the rows themselves. No process asks another."""
    if not isinstance(tensor, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor; of a sharded one all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and world size; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(n: int) -> range:
    """Share of this process in ``range(n)``: contiguous, in rank order, sizes differ by at most
    1."""
    rank, world = rank_and_world()
    return range(n * rank // world, n * (rank + 1) // world)


def all_reduce_mean(value: Tensor) -> Tensor:
    """Mean of ``value`` over all processes (itself if there is one). Not differentiable."""
    world = rank_and_world()[1]
    if world == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world


def all_reduce_max(value: Tensor) -> Tensor:
    """Maximum of ``value`` over all processes (itself if there is one). Not differentiable."""
    if rank_and_world()[1] == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def mean_with_gradient(value: Tensor) -> Tensor:
    """Mean of ``value`` over all processes; itself for a single process.

    Differentiable: a loss is the mean of what the processes have, as that of averaged gradients,
    so each gets the mean over all processes of the mean's gradient.
    """
    return value if rank_and_world()[1] == 1 else _Mean.apply(value)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_mean(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_mean(grad)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Gather rows (n, ...) of all processes, n each, in rank order; itself for a single process.

    Differentiable, for a loss that every process computes alike from all rows: each gets its own
    rows' gradient times the number of processes, of which averaging over them makes the loss's.
    """
    return rows if rank_and_world()[1] == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rank, world = rank_and_world()
        parts = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        world = rank_and_world()[1]
        return grad.chunk(world)[ctx.rank] * world


def gather_rows(rows: Tensor) -> Tensor:
    """Gather rows (n, ...) of all processes, concatenated in rank order, on every process.

    ``n`` may differ, even be 0; the other dimensions and the dtype must not. Itself for a single
    process. Not differentiable.
    """
    world = rank_and_world()[1]
    if world == 1:
        return rows
    rows = rows.detach().contiguous()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    # Collectives need equal shapes.
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_texts(text: str) -> list[str]:
    """Gather a text of every process, in rank order, on all of them. All must call it."""
    if rank_and_world()[1] == 1:
        return [text]
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = gather_rows(torch.tensor([len(own)])).tolist()
    return [bytes(part.tolist()).decode() for part in gather_rows(own).split(sizes)]
