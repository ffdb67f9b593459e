"""The one collective that tasks may use; alone it does nothing."""

import torch.distributed as dist
from torch import Tensor


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over all processes (itself when there is one). Not differentiable."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
