"""k-NN: weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.common.distributed import gather_rows, share
from ssl_vit.common.errors import check
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.options import FEATURES
from ssl_vit.evaluators.scores import Prediction, labelled

_CELLS = 1 << 25
_BANK_ROWS = 1 << 16
_QUERIES = 1 << 14


def knn_predictions(
    train: FeatureSet,
    val: FeatureSet | None,
    ks: Sequence[int],
    features: Sequence[str],
    device: torch.device,
    temperature: float = 0.07,
    shared: bool = True,
) -> list[Prediction]:
    """k-NN predictions for each feature and each k up to the size of the training set.

    ``val`` None: leave-one-out, each training image by all others; excluded by its index, so that a
    copy of it in the set is a neighbour like any other; where groups are known, images of its own
    group are none. ``shared``: all processes call this with
    the same sets; each takes a part of the queries, and all get the whole result.

    Raises:
        UserError: training labels are missing, or every k is too large.
    """
    labels = labelled(train.labels, "the training set")
    queries, count = (train, others(train)) if val is None else (val, len(labels))
    possible = [k for k in ks if k <= count]
    grouped = val is None and train.groups is not None
    of = f", and {count} beside the largest group" if grouped else ""
    check(bool(possible), f"k is {tuple(ks)}; the training set has {len(labels)} images{of}")
    own = share(len(queries.index)) if shared else range(len(queries.index))
    found = []
    for name in features:
        bank = [train.parts[part] for part in FEATURES[name]]
        rows = [queries.parts[part][own.start : own.stop] for part in FEATURES[name]]
        first = own.start if val is None else None
        apart = train.groups if val is None else None
        by_k = knn_classify(bank, labels, rows, possible, device, temperature, first, apart)
        for k, guesses in by_k.items():
            guesses = gather_rows(guesses) if shared else guesses
            details = {"k": k, "temperature": temperature, "leave_one_out": val is None}
            found.append(Prediction(name, f"k={k}", guesses, details))
    return found


def others(train: FeatureSet) -> int:
    """Neighbours that each image of a set has at least, leave-one-out: all but itself or, where
    groups are known, those of other groups."""
    if train.groups is None:
        return len(train.labels) - 1
    return len(train.labels) - int(train.groups.unique(return_counts=True)[1].max())


def knn_classify(
    bank: Sequence[Tensor],
    labels: Tensor,
    queries: Sequence[Tensor],
    ks: Sequence[int],
    device: torch.device,
    temperature: float = 0.07,
    first: int | None = None,
    groups: Int64[Tensor, " n"] | None = None,
) -> dict[int, Tensor]:
    """Classify queries by votes of their k nearest neighbours; all k in one pass over the bank.

    Similarity is the cosine s; each neighbour votes with weight exp(s / temperature). A k above
    the number of neighbours means all. Memory does not grow with the number of images: bank and
    queries may be on any device, and are moved to ``device`` in chunks, the bank once for each 2^14
    queries; at most 2^25 numbers of a kind (similarities, votes, features) exist at once.
    Non-finite features count as zeros.

    Args:
        bank, queries: features as parts (n, _) and (q, _) to concatenate.
        labels: (n,) classes, or (n, L) labels 1, 0 or NaN, of the bank.
        first: the queries are the bank's rows from this one on, and none is its own neighbour.
        groups: with ``first``, of the bank's rows; none of its own group is a neighbour.

    Returns:
        (q, at most 5) int64 classes, best first, the lower of equal votes; or (q, L) float32, the
        weighted mean of the neighbours' known labels. On the CPU.
    """
    n, q = len(bank[0]), len(queries[0])
    width, most = sum(part.shape[1] for part in bank), min(max(ks), n - (first is not None))
    several = labels.ndim == 2
    outcomes = most * labels.shape[1] if several else int(labels.max()) + 1
    step = max(1, min(_QUERIES, _CELLS // max(outcomes, width)))
    labels = labels.to(device)
    usual = labels.nanmean(0).nan_to_num(0) if several else None
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for start in range(0, max(q, 1), step):  # once without queries, for the right shapes
        part = unit(queries, start, start + step, device)
        own = None if first is None else first + start
        similarity, index = nearest_neighbours(bank, part, most, own, groups)
        # The largest is subtracted: the decisive weights are near 1, and do not underflow.
        weight, label = ((similarity - similarity[:, :1]) / temperature).exp(), labels[index]
        for k in ks:
            if usual is None:
                guesses = class_votes(weight[:, :k], label[:, :k], outcomes)
            else:
                guesses = label_means(weight[:, :k], label[:, :k], usual)
            found[k].append(guesses.cpu())
    return {k: torch.cat(parts) for k, parts in found.items()}


def unit(
    parts: Sequence[Tensor], start: int, stop: int, device: torch.device
) -> Float[Tensor, "b d"]:
    """L2-normalised rows of features, on the device."""
    rows = [part[start:stop].to(device, torch.float32) for part in parts]
    joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    return F.normalize(joined, dim=1).nan_to_num_(0)


def nearest_neighbours(
    bank: Sequence[Tensor],
    queries: Float[Tensor, "q d"],
    k: int,
    own: int | None = None,
    groups: Int64[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Nearest neighbours: cosine and bank row of each query's k nearest, nearest first.

    Of equal cosines the lower row comes first, independent of the chunks. Equal as computed: copies
    of one image may differ in the last bit where a matrix product treats the edges of its operands
    differently, and so may chunks of different processes.

    Args:
        queries: L2-normalised.
        own: the queries are the bank's rows from this one on, and none is its own neighbour.
        groups: with ``own``, of the bank's rows: those of its own group have a cosine of minus
            infinity.
    """
    groups = None if groups is None else groups.to(queries.device)
    step = max(1, min(len(bank[0]), _BANK_ROWS, _CELLS // queries.shape[1]))
    blocks = queries.split(max(1, _CELLS // step))
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(bank[0]), step):
        chunk = unit(bank, start, start + step, queries.device)
        for i, block in enumerate(blocks):
            similarity = block @ chunk.T
            row = 0 if own is None else own + i * len(blocks[0])
            if own is not None and groups is None:
                similarity.diagonal(row - start).fill_(-torch.inf)
            elif own is not None and groups is not None:
                mine, theirs = groups[row : row + len(block)], groups[start : start + step]
                similarity.masked_fill_(mine[:, None] == theirs, -torch.inf)
            values, places = largest(similarity, min(k, len(chunk)))
            if start:
                found[i] = merged(found[i], (values, places + start), k)
            else:
                found.append((values, places))
    best, index = zip(*found, strict=True)
    return torch.cat(best), torch.cat(index)


def merged(
    one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], k: int
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Merge two top-k lists into the k largest values and their indices; stable for ties."""
    values, places = (torch.cat(pair, dim=1) for pair in zip(one, two, strict=True))
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], places.gather(1, order[:, :k])


def largest(
    values: Float[Tensor, "q n"], k: int
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Stable top-k of each row: values and indices, largest first, the first of equal ones.

    ``topk`` does not define which of equal values it takes, nor their order.
    """
    found, places = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = (found[:, 1:] == found[:, :-1]).any(1).nonzero()[:, 0]
    found, places = found[:, :k], places[:, :k]
    if len(tied):
        rows, last = values[tied], found[tied, -1:]
        above, equal = rows > last, rows == last
        room = k - above.sum(1, keepdim=True)
        taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
        left = taken.nonzero()[:, 1].view(-1, k)
        found[tied], order = rows.gather(1, left).sort(dim=1, descending=True, stable=True)
        places[tied] = left.gather(1, order)
    return found, places


def class_votes(
    weight: Float[Tensor, "q k"], label: Int64[Tensor, "q k"], classes: int
) -> Int64[Tensor, "q top"]:
    """Classes with the largest summed weight, best first, at most 5."""
    votes = summed_votes(weight, label, classes)
    # Classes without a vote in order of index: ties of all of them would be much slower.
    order = torch.arange(classes, device=weight.device, dtype=votes.dtype)
    return largest(torch.where(votes > 0, votes, -order), min(5, classes))[1]


def summed_votes(
    weight: Float[Tensor, "q k"], label: Int64[Tensor, "q k"], classes: int
) -> Float[Tensor, "q {classes}"]:
    """Sum of the weights for each class; on CUDA, too, in an order that repeats."""
    if weight.device.type == "cuda":
        return votes_by_products(weight, label, classes)
    return weight.new_zeros(len(weight), classes).scatter_add_(1, label, weight)


def votes_by_products(
    weight: Float[Tensor, "q k"], label: Int64[Tensor, "q k"], classes: int
) -> Float[Tensor, "q {classes}"]:
    """Sum of the weights for each class, as products with ones and zeros: on CUDA ``scatter_add_``
    sums in any order."""
    every = torch.arange(classes, device=weight.device)
    step = max(1, _CELLS // (weight.shape[1] * classes))
    parts = zip(weight.split(step), label.split(step), strict=True)
    return torch.cat([(w[:, None] @ (n[:, :, None] == every).to(w))[:, 0] for w, n in parts])


def label_means(
    weight: Float[Tensor, "q k"], label: Float[Tensor, "q k l"], usual: Float[Tensor, " l"]
) -> Float[Tensor, "q l"]:
    """Weighted mean of the neighbours' known labels; ``usual`` where none is known."""
    known = torch.einsum("qk,qkl->ql", weight, (~label.isnan()).to(weight))
    total = torch.einsum("qk,qkl->ql", weight, label.nan_to_num(0).to(weight))
    return torch.where(known > 0, total / known.clamp_min(torch.finfo(known.dtype).tiny), usual)
