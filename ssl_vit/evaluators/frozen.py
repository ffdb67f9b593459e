"""Frozen features of many images: statistics, room to keep them, and batches to train heads on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from ssl_vit.common.schedules import warmup_cosine

log = logging.getLogger("ssl_vit")
BATCH = 16
WARMUP = 0.1
_EPSILON = 1e-6
# How often a training logs its progress.
_WORDS = 5
M_co = TypeVar("M_co", covariant=True)


class Statistics:
    """Running statistics of channels, summed in double precision on the CPU: not every device has
    it."""

    def __init__(self) -> None:
        self.n, self.first, self.second = 0, torch.zeros(1), torch.zeros(1)
        self.device = torch.device("cpu")

    def add(self, tokens: Float16[Tensor, "b d *places"]) -> None:
        """Add the tokens of some images."""
        values, self.device = tokens.cpu().double(), tokens.device
        over = [0, *range(2, values.ndim)]
        self.n += values[:, 0].numel()
        self.first = self.first + values.sum(over)
        self.second = self.second + values.square().sum(over)

    def result(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Mean and standard deviation, with an epsilon in the variance, on the tokens' device."""
        mean = self.first / self.n
        variance = (self.second / self.n - mean.square()).clamp(min=0)
        std = (variance + _EPSILON).sqrt()
        return mean.float().to(self.device), std.float().to(self.device)


def room(parts: list[Tensor], n: int, cache_gb: float, what: str) -> list[Tensor] | None:
    """Room for ``n`` images of which these are parts of some, each (b, ...); None, which is logged,
    where that exceeds ``cache_gb`` 1e9 bytes. ``what``: they are."""
    needed = n * sum(part[0].nbytes for part in parts) / 1e9
    if needed <= cache_gb:
        return [torch.empty(n, *part.shape[1:], dtype=part.dtype) for part in parts]
    log.info("%s need %.1f GB, above --cache-gb %g: recomputed each epoch", what, needed, cache_gb)
    return None


def warn_unreadable(bad: dict[int, str], what: str) -> None:
    """Name the first of what could not be read; ``what``: it is."""
    for reason in list(bad.values())[:5]:
        log.warning("unreadable %s skipped: %s", what, reason)


@runtime_checkable
class Batched(Protocol[M_co]):
    """Material that gives batches of some of its images: inputs of heads, and targets."""

    def batches(self, rows: Int64[Tensor, " k"], size: int) -> Iterator[tuple[M_co, Tensor]]:
        """Batches of ``size`` of these images."""


def training_batches(
    material: Batched[M_co],
    rows: Int64[Tensor, " n"],
    epochs: int,
    generator: torch.Generator,
    what: str,
) -> Iterator[tuple[M_co, Tensor, float]]:
    """Batches of all epochs, shuffled by ``generator``, and the learning rate as a share of its
    peak: linear warm-up over a tenth, then half a cosine to 0. ``what``: is trained."""
    # At least 8 batches per epoch, so that small sets get enough steps.
    size = max(1, min(BATCH, len(rows) // 8))
    total, step = epochs * math.ceil(len(rows) / size), 0
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for seen, targets in material.batches(order, size):
            factor = warmup_cosine(step, warmup=round(WARMUP * total), total=total, peak=1.0)
            yield seen, targets, factor
            step += 1
            if step % max(1, total // _WORDS) == 0:
                log.info("%s: step %d of %d", what, step, total)
