"""Batches on their way from a data worker: a few large tensors, and one of all small ones.

Each tensor that a process sends is a file in shared memory, and the receiver connects to the
sender, which is at work on the next batch, to be handed each file: 0.2 ms and more for each. Of a
batch of small images there would be a dozen.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

_SMALL = 2**20  # bytes of a tensor that goes with others: to copy it costs less than a file
_TINY = 2**16  # bytes of a tensor that is taken out of the file again
_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Packed:
    """Batch on its way: its tensors are in shared memory, of which ``data`` has the handles."""

    data: bytes

    def open(self) -> Any:
        """The batch, in the main process."""
        return ForkingPickler.loads(self.data)

    def pin_memory(self) -> Any:
        """Hook of torch's loader: the batch in pinned memory."""
        return pin_memory(self.open())


def packed(collate: Callable[[Any], Any], batch: Any) -> Packed:
    """Put what ``collate`` makes of a batch into shared memory."""
    made, data = collate(batch), io.BytesIO()
    finder = _Finder(io.BytesIO())
    finder.dump(made)
    _Sender(data, finder.small).dump(made)
    return Packed(data.getvalue())


class _Finder(ForkingPickler):
    """Sends nothing, but finds the small tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.small: list[Tensor] = []

    def reducer_override(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return NotImplemented
        if _is_small(item):
            self.small.append(item)
        return int, ()


class _Sender(ForkingPickler):
    """Sends these tensors as parts of one, all others as they are."""

    def __init__(self, file: io.BytesIO, small: list[Tensor]) -> None:
        super().__init__(file)
        sizes = [-(-t.nbytes // _ALIGNED) * _ALIGNED for t in small]
        starts = list(accumulate(sizes, initial=0))
        self.whole = torch.empty(starts[-1], dtype=torch.uint8)
        self.starts = dict(zip(map(id, small), starts, strict=False))
        for tensor in small:
            start, flat = self.starts[id(tensor)], tensor.as_strided((tensor.numel(),), (1,))
            self.whole[start : start + tensor.nbytes] = flat.view(torch.uint8)

    def reducer_override(self, item: Any) -> Any:
        start = self.starts.get(id(item)) if isinstance(item, Tensor) else None
        if start is None:
            return NotImplemented
        return _part, (self.whole, start, item.dtype, tuple(item.shape), item.stride())


def _is_small(tensor: Tensor) -> bool:
    """True for a plain, small tensor whose memory is its numbers, in some order, without gaps."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.requires_grad:
        return False
    if tensor.layout != torch.strided or tensor.nbytes > _SMALL:
        return False
    by_pixel = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return by_pixel or tensor.is_contiguous()


def _part(
    whole: Tensor,
    start: int,
    kind: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Tensor:
    """The tensor that begins there; where it is tiny a copy, as who keeps the labels of all batches
    must not keep the batches."""
    size = kind.itemsize * torch.Size(shape).numel()
    part = whole[start : start + size].view(kind).as_strided(shape, strides)
    return part.clone() if size <= _TINY else part
