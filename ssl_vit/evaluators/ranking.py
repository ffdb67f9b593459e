"""Ranking: how high the positives of each query stand among all images, by cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.common.distributed import gather_rows, share
from ssl_vit.evaluators.knn import unit

RECALLS = (1, 5, 10)
_CELLS = 1 << 22
_BANK_ROWS = 1 << 16

Relevant = Callable[[Int64[Tensor, " b"]], Bool[Tensor, "b n"]]
"""Positives of queries (rows), as a mask of the rows of the gallery."""


@dataclass(frozen=True)
class Ranked:
    """Ranked galleries, one for each of q queries, on the CPU.

    ``precision``: average precision, NaN without a positive. ``first``: rank of the first positive
    from 1 on, 0 without one. ``positives``: how many there are.
    """

    precision: Float[Tensor, " q"]
    first: Int64[Tensor, " q"]
    positives: Int64[Tensor, " q"]

    def metrics(self) -> dict[str, float]:
        """Mean average precision, and recall@k: the share of queries with a positive among the
        first k. In percent, over the queries that have a positive."""
        usable = self.positives > 0
        precision, first = self.precision[usable], self.first[usable]
        found = {"map": 100.0 * float(precision.mean())}
        return found | {f"recall@{k}": 100.0 * float((first <= k).double().mean()) for k in RECALLS}


def rank_queries(
    gallery: Sequence[Tensor],
    queries: Sequence[Tensor],
    relevant: Relevant,
    device: torch.device,
    excluded: Relevant | None = None,
) -> Ranked:
    """Rank the whole gallery for each query by cosine, and judge it by ``relevant``.

    Average precision is the mean over positives of the precision at their rank; of equal cosines,
    at the last of them, so that the order of the images does not matter. For recall the lower row
    comes first. Memory does not grow with the product of both numbers: at most 2^22 similarities
    exist at once (or a row of them). All processes call this with the same sets, and each ranks for
    a part of the queries.

    Args:
        gallery, queries: features as parts (n, _) and (q, _) to concatenate, anywhere.
        excluded: images that are not ranked: the query itself, those of its group.
    """
    n, own = len(gallery[0]), share(len(queries[0]))
    found = []
    step = max(1, _CELLS // n)
    for start in range(own.start, max(own.stop, own.start + 1), step):
        rows = torch.arange(start, min(start + step, own.stop))
        cosines = _cosines(gallery, queries, rows, device, excluded)
        found.append(_judged(cosines, relevant(rows).to(device) & cosines.isfinite()))
    precision, first, positives = (
        gather_rows(torch.cat(parts)) for parts in zip(*found, strict=True)
    )
    return Ranked(precision, first, positives)


def first_ranked(
    gallery: Sequence[Tensor],
    queries: Sequence[Tensor],
    rows: Int64[Tensor, " b"],
    k: int,
    device: torch.device,
    excluded: Relevant | None = None,
) -> tuple[Int64[Tensor, "b k"], Float[Tensor, "b k"]]:
    """First of :func:`rank_queries` for a few queries (rows): rows of the gallery, and
    cosines, on the CPU; fewer than ``k`` where fewer are ranked."""
    cosines = _cosines(gallery, queries, rows, device, excluded)
    k = min(k, int(cosines.isfinite().sum(1).min()))
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    return order[:, :k].cpu(), cosines[:, :k].cpu()


def _cosines(
    gallery: Sequence[Tensor],
    queries: Sequence[Tensor],
    rows: Int64[Tensor, " b"],
    device: torch.device,
    excluded: Relevant | None,
) -> Float[Tensor, "b n"]:
    """Cosines of some queries with the whole gallery; minus infinity where it is excluded."""
    asked = unit([part[rows] for part in queries], 0, len(rows), device)
    starts = range(0, len(gallery[0]), _BANK_ROWS)
    found = [asked @ unit(gallery, at, at + _BANK_ROWS, device).T for at in starts]
    cosines = torch.cat(found, dim=1)
    if excluded is not None:
        cosines.masked_fill_(excluded(rows).to(device), -torch.inf)
    return cosines


def _judged(
    cosines: Float[Tensor, "b n"], positive: Bool[Tensor, "b n"]
) -> tuple[Float[Tensor, " b"], Int64[Tensor, " b"], Int64[Tensor, " b"]]:
    """Average precision, rank of the first positive, and number of positives, of each row."""
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    hits = positive.gather(1, order)
    above = hits.cumsum(1)
    rows, places = (part.cpu() for part in hits.nonzero(as_tuple=True))
    ends = last_of_equals(cosines)[rows, places].cpu()
    counts, n = hits.sum(1).cpu(), len(hits)
    precision = above[rows, ends].cpu().double() / (ends + 1)
    summed = torch.from_numpy(np.bincount(rows.numpy(), precision.numpy(), minlength=n))
    first = torch.where(counts > 0, hits.int().argmax(1).cpu() + 1, 0)
    return summed / counts.where(counts > 0, torch.nan), first, counts


def last_of_equals(sorted_values: Float[Tensor, "b n"]) -> Int64[Tensor, "b n"]:
    """Index of the last value that equals each one, in sorted rows."""
    b, n = sorted_values.shape
    last = torch.ones(b, n, dtype=torch.bool, device=sorted_values.device)
    last[:, :-1] = sorted_values[:, 1:] != sorted_values[:, :-1]
    places = torch.arange(n, device=last.device).where(last, n)
    return places.flip(1).cummin(1).values.flip(1)


def by_labels(queries: Tensor, gallery: Tensor) -> Relevant:
    """Positives by labels: images of the query's class or, of several labels, that share one.

    ``queries``, ``gallery``: (q,) and (n,) classes, -1 unknown, or (q, L) and (n, L) labels 1, 0,
    or NaN.
    """
    if queries.ndim == 1:
        return lambda rows: (queries[rows, None] == gallery) & (gallery >= 0)
    ours, theirs = (queries == 1).float(), (gallery == 1).float()
    return lambda rows: ours[rows] @ theirs.T > 0


def by_pairs(queries: Int64[Tensor, " p"], positives: Int64[Tensor, " p"], n: int) -> Relevant:
    """Positives by pairs of rows: of the queries, and of a gallery of ``n`` images."""
    order = queries.argsort(stable=True)
    asked, answers = queries[order], positives[order]

    def relevant(rows: Int64[Tensor, " b"]) -> Bool[Tensor, "b n"]:
        made = torch.zeros(len(rows), n, dtype=torch.bool)
        starts, stops = torch.searchsorted(asked, rows), torch.searchsorted(asked, rows, right=True)
        for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            made[i, answers[start:stop]] = True
        return made

    return relevant


def itself(groups: Int64[Tensor, " n"] | None, n: int) -> Relevant:
    """Exclusion where the gallery is the queries: each itself or, with ``groups``, its own."""
    units = torch.arange(n) if groups is None else groups
    return lambda rows: units[rows, None] == units
