"""Transfer: numbers of the host on a device, without the host waiting for it."""

import torch
from torch import Tensor


def without_wait(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on a device; from the CPU to CUDA by way of pinned memory.

    From pageable memory the driver would copy them first, in the host's time.
    """
    to_cuda = values.device.type == "cpu" and device.type == "cuda"
    if to_cuda and torch.cuda.is_available():  # where it is not, tensors are fake
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
