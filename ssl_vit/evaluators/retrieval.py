"""Retrieval: the images with the features most similar to a query's."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.data.base import Source
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.knn import nearest_neighbours, unit


def nearest_images(
    queries: Float[Tensor, "q d"],
    bank: Float[Tensor, "n d"],
    k: int,
    own: Int64[Tensor, " q"] | None = None,
) -> tuple[Int64[Tensor, "q k"], Float[Tensor, "q k"]]:
    """Nearest images: bank rows most similar to each query, most similar first, and cosines.

    Of equal cosines the lower row comes first. Memory does not grow with the bank: similarities
    exist in chunks. Results are on the queries' device.

    Args:
        own: the query's own row in the bank, which is excluded; -1: it has none. By row: a copy of
            the query elsewhere is a neighbour like any other.

    Raises:
        UserError: k is below 1, or above the number of rows to choose from.
    """
    count = len(bank) - (own is not None)
    check(1 <= k <= count, f"--k is {k}; images to find neighbours among are {count}")
    if not len(queries):
        empty = queries.new_empty(0, k)
        return empty.long(), empty.float()
    rows = unit([queries], 0, len(queries), queries.device)
    # One more, to replace the query itself, at any rank among equal cosines.
    cosines, places = nearest_neighbours([bank], rows, k + (own is not None))
    if own is None:
        return places, cosines
    left_out = places == own.to(places.device)[:, None]
    left_out[:, -1] |= ~left_out.any(1)
    return places[~left_out].view(-1, k), cosines[~left_out].view(-1, k)


def same_class(
    queries: tuple[Source, FeatureSet], answers: tuple[Source, FeatureSet]
) -> Bool[np.ndarray, "q k"] | None:
    """Class agreement: whether each answer has its query's class, by class name.

    Args:
        queries: a source and q images of it.
        answers: a source and q times k images of it, row by row.

    Returns:
        None where an image of either has no class, or may have several.
    """
    asked, found = (_class_names(*part) for part in (queries, answers))
    if asked is None or found is None:
        return None
    return found.reshape(len(asked), -1) == asked[:, None]


def _class_names(source: Source, features: FeatureSet) -> np.ndarray | None:
    """Class name of each image; None where unknown."""
    labels = features.labels
    if labels.ndim != 1 or bool((labels < 0).any()):
        return None
    classes = source.classes
    return np.array([classes[i] if classes else str(i) for i in labels.tolist()])
