"""What code that knows of one device may ask of all processes; alone it does nothing."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its rows of a sharded one, in the same memory; else all.

    Gradients do not flow through it.
    """
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(n: int) -> range:
    """This process's part of ``range(n)``: contiguous, in rank order, sizes differ by at most 1."""
    rank, world = rank_and_world()
    return range(n * rank // world, n * (rank + 1) // world)


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over all processes (itself when there is one). Not differentiable."""
    world = rank_and_world()[1]
    if world == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world


def gather_rows(rows: Tensor) -> Tensor:
    """All processes' rows (n, ...) one after the other, in rank order; the same on every process.

    ``n`` may differ, even be 0; the other dimensions and the type must not. Itself when alone. Not
    differentiable.
    """
    world = rank_and_world()[1]
    if world == 1:
        return rows
    rows = rows.detach().contiguous()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    # A collective moves equal shapes only.
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_texts(text: str) -> list[str]:
    """Every process's text, in rank order, on all of them. All must call it."""
    if rank_and_world()[1] == 1:
        return [text]
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = gather_rows(torch.tensor([len(own)])).tolist()
    return [bytes(part.tolist()).decode() for part in gather_rows(own).split(sizes)]
