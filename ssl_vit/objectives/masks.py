"""Masks: which patches of an image are hidden, drawn for one image in the workers."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool


def random_units(
    grid: tuple[int, int], unit: int, ratio: float, rng: np.random.Generator
) -> Bool[np.ndarray, " n"]:
    """Square units at random (Xie et al. 2021, section 3.2): (N,) True where a patch is hidden.

    ``unit``: patches of a unit's side; it divides the grid. Of the units the share ``ratio``,
    rounded up, is hidden: as many of every image.
    """
    rows, cols = grid[0] // unit, grid[1] // unit
    hidden = np.zeros(rows * cols, dtype=bool)
    hidden[rng.permutation(rows * cols)[: math.ceil(rows * cols * ratio)]] = True
    whole = hidden.reshape(rows, cols).repeat(unit, axis=0).repeat(unit, axis=1)
    return whole.reshape(-1)
