"""Batches on their way to the device while the one before is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ssl_vit.data.loader import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches in the same order, their views on ``device``.

    On CUDA each is copied while the one before it is in use, on a stream of its own; from pinned
    memory nobody waits for that. What ``batches`` raises comes through, there a batch early.
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
            yield _arrived(*sent.pop(0))  # nothing here refers to it any more
    if sent:
        yield _arrived(*sent.pop())


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, for use on the current stream, which waits for its copies and no later ones."""
    views = batch.views
    tensors = [*views.crops, views.keys, views.labels, *views.photometric]
    current = torch.cuda.current_stream(views.keys.device)
    current.wait_event(copied)
    for tensor in tensors:
        # The memory belongs to the other stream, which must not reuse it before this one is done.
        tensor.record_stream(current)
    return batch
