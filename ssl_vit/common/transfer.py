"""Transfer: numbers of the host on a device, without the host waiting for it."""

import torch
from torch import Tensor


def without_wait(values: Tensor, device: torch.device) -> Tensor:
    """``values``, on the CPU, on a device; on CUDA by way of pinned memory.

    From pageable memory the driver would copy them first, in the host's time.
    """
    if device.type == "cuda" and torch.cuda.is_available():  # fake tensors need no device
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
