"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

_CELLS = 1 << 25


def knn_classify(
    bank: Float[Tensor, "n d"],
    bank_labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "q d"],
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, Int64[Tensor, "q top"]]:
    """The classes of each query by votes of its k nearest, best first, at most 5; for every k.

    Similarity is the cosine s; each neighbour votes for its class with weight
    exp(s / temperature). Queries are taken in chunks, so that memory does not grow with their
    number: at most 2^25 similarities or votes exist at once.
    """
    classes = int(bank_labels.max()) + 1
    bank = F.normalize(bank, dim=1)
    chunk = max(1, _CELLS // max(len(bank), classes))
    largest = min(max(ks), len(bank))
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, index = (part @ bank.T).topk(largest, dim=1)
        # exp(s / T) overflows nothing: s <= 1. The largest is taken out all the same, for fp16.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        label = bank_labels[index]
        for k in ks:
            score = torch.zeros(len(part), classes, dtype=weight.dtype, device=weight.device)
            score.scatter_add_(1, label[:, :k], weight[:, :k])
            votes[k].append(score.topk(min(5, classes), dim=1).indices)
    return {k: torch.cat(parts) for k, parts in votes.items()}


def accuracy(predicted: Int64[Tensor, "q top"], labels: Int64[Tensor, " q"], top: int = 1) -> float:
    """Share of queries, in percent, whose label is among the first ``top`` predicted classes."""
    return 100.0 * float((predicted[:, :top] == labels[:, None]).any(1).double().mean())
