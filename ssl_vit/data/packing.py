"""Batches on their way from a data worker: a few large tensors, and one of all small ones.

Each tensor that a process sends is a file in shared memory, and the receiver connects to the
sender, which is at work on the next batch, to be handed each file: 0.2 ms and more for each. Of a
batch of small images there would be a dozen.
"""

from __future__ import annotations

import io
import pickle
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
# Of a tensor: type, shape, strides.
_Form = tuple[torch.dtype, torch.Size, tuple[int, ...]]


@dataclass(frozen=True)
class Packed:
    """Batch on its way: its tensors are in shared memory, of which ``data`` has the handles."""

    data: bytes

    def open(self) -> Any:
        """The batch, in the main process."""
        small, forms, rest = ForkingPickler.loads(self.data)
        sizes = [_padded(form) for form in forms]
        parts = [] if small is None else small.split(sizes)
        tensors = [_own(_as(part, form)) for part, form in zip(parts, forms, strict=True)]
        return _Unpickler(io.BytesIO(rest), tensors).load()

    def pin_memory(self) -> Any:
        """Hook of torch's loader: the batch in pinned memory."""
        return pin_memory(self.open())


def packed(collate: Callable[[Any], Any], batch: Any) -> Packed:
    """Put what ``collate`` makes of a batch into shared memory."""
    rest = io.BytesIO()
    pickler = _Pickler(rest)
    pickler.dump(collate(batch))
    small = pickler.small
    forms = [(t.dtype, t.shape, t.stride()) for t in small]
    together = _together(small, [_padded(form) for form in forms]) if small else None
    return Packed(bytes(ForkingPickler.dumps((together, forms, rest.getvalue()))))


class _Pickler(ForkingPickler):
    """Leaves out small tensors, and keeps them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.small: list[Tensor] = []

    def persistent_id(self, item: Any) -> int | None:
        if type(item) is not Tensor or item.device.type != "cpu" or item.requires_grad:
            return None
        if not _dense(item) or item.nbytes > _SMALL:
            return None
        self.small.append(item)
        return len(self.small) - 1


class _Unpickler(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, file: io.BytesIO, small: list[Tensor]) -> None:
        super().__init__(file)
        self.small = small

    def persistent_load(self, index: int) -> Tensor:
        return self.small[index]


def _dense(tensor: Tensor) -> bool:
    """Whether its memory is its numbers, in some order, without gaps."""
    if tensor.layout != torch.strided:
        return False
    by_pixel = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return by_pixel or tensor.is_contiguous()


def _padded(form: _Form) -> int:
    size = form[0].itemsize * form[1].numel()
    return -(-size // _ALIGNED) * _ALIGNED


def _together(tensors: list[Tensor], sizes: list[int]) -> Tensor:
    """Their memory, one after the other."""
    whole = torch.empty(sum(sizes), dtype=torch.uint8)
    for tensor, start in zip(tensors, accumulate(sizes, initial=0), strict=False):
        flat = tensor.as_strided((tensor.numel(),), (1,))
        whole[start : start + tensor.nbytes] = flat.view(torch.uint8)
    return whole


def _own(tensor: Tensor) -> Tensor:
    """A copy, where that is small: who keeps the labels of all batches keeps no batch."""
    return tensor.clone() if tensor.nbytes <= _TINY else tensor


def _as(memory: Tensor, form: _Form) -> Tensor:
    """A tensor of this form, which begins at the beginning of this memory."""
    kind, shape, strides = form
    flat = memory[: kind.itemsize * shape.numel()].view(kind)
    return flat.as_strided(shape, strides)
