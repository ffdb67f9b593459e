"""Prefetching: copies a batch to the device while the previous one is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ssl_vit.data.batch import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Prefetch batches to ``device``, in the same order.

    On CUDA each is copied while the previous one is in use, on a separate stream; from pinned
    memory the copy is asynchronous. Exceptions of ``batches`` are passed on; on CUDA one batch
    early.
    """
    if device.type == "cuda":
        return _one_ahead(batches, device)
    return (replace(batch, views=batch.views.to(device)) for batch in batches)


def _one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    stream = torch.cuda.Stream(device)
    sent: list[tuple[Batch, torch.cuda.Event]] = []
    for batch in batches:
        with torch.cuda.stream(stream):
            sent.append((replace(batch, views=batch.views.to(device)), stream.record_event()))
        if len(sent) > 1:
            yield _arrived(*sent.pop(0))  # no reference is kept here
    if sent:
        yield _arrived(*sent.pop())


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Make a batch usable on the current stream, which waits for this copy and no later one."""
    current = torch.cuda.current_stream(batch.views.keys.device)
    current.wait_event(copied)
    for tensor in batch.views.tensors():
        if tensor.is_cuda:
            # The memory is the copy stream's, which must not reuse it before this one is done.
            tensor.record_stream(current)
    return batch
