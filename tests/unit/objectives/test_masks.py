"""Masks in units: how many, whole, and every unit as often as another."""

import math

import numpy as np
import pytest

from ssl_vit.objectives.masks import random_units

GRIDS = [((6, 6), 2), ((4, 10), 2), ((9, 3), 3), ((3, 5), 1), ((8, 4), 4), ((14, 14), 2)]


def units_of(mask: np.ndarray, grid: tuple[int, int], unit: int) -> np.ndarray:
    """(units, patches of one), units row by row."""
    rows, cols = grid[0] // unit, grid[1] // unit
    apart = mask.reshape(rows, unit, cols, unit).swapaxes(1, 2)
    return apart.reshape(rows * cols, unit * unit)


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.6, 0.9])
@pytest.mark.parametrize(("grid", "unit"), GRIDS)
def test_an_exact_number_of_whole_units(grid, unit, ratio):
    n = grid[0] * grid[1]
    units = n // unit**2
    for seed in range(20):
        mask = random_units(grid, unit, ratio, np.random.default_rng(seed))
        assert (mask.shape, mask.dtype) == ((n,), np.bool_)
        hidden = units_of(mask, grid, unit)
        assert (hidden == hidden[:, :1]).all(), "a unit is hidden in part"
        assert hidden[:, 0].sum() == math.ceil(units * ratio)


def test_units_lie_in_rows_of_the_grid():
    """The one visible unit of a grid that is not square, patch by patch."""
    for seed in range(20):
        mask = random_units((4, 6), 2, 0.8, np.random.default_rng(seed)).reshape(4, 6)
        rows, cols = np.nonzero(~mask)
        assert set(rows.tolist()) in ({0, 1}, {2, 3})
        assert set(cols.tolist()) in ({0, 1}, {2, 3}, {4, 5})
        assert len(rows) == 4


def test_a_mask_is_a_function_of_the_generator():
    def draws(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.stack([random_units((6, 10), 2, 0.6, rng) for _ in range(5)])

    np.random.seed(1)
    first = draws(3)
    np.random.seed(2)
    assert np.array_equal(draws(3), first)
    assert not np.array_equal(draws(4), first)
    assert len({mask.tobytes() for mask in first}) == 5, "each draw is another"


@pytest.mark.parametrize(("grid", "unit", "ratio"), [((4, 10), 2, 0.6), ((3, 5), 1, 0.25)])
def test_every_unit_is_hidden_equally_often(grid, unit, ratio):
    """And every pair together. Of n units k are hidden in each of the draws: counts' chi-square,
    scaled by (n - 1) / (n - k), has n - 1 degrees of freedom."""
    rng, draws = np.random.default_rng(0), 4000
    masks = np.stack([random_units(grid, unit, ratio, rng) for _ in range(draws)])
    hidden = np.stack([units_of(mask, grid, unit)[:, 0] for mask in masks]).astype(float)
    n = hidden.shape[1]
    k = math.ceil(n * ratio)
    expected = draws * k / n
    chi_square = ((hidden.sum(0) - expected) ** 2 / expected).sum() * (n - 1) / (n - k)
    # Mean n - 1, variance 2 (n - 1): within four deviations, on either side.
    assert abs(chi_square - (n - 1)) < 4 * math.sqrt(2 * (n - 1))
    together = (hidden.T @ hidden)[np.triu_indices(n, 1)] / draws
    share = k * (k - 1) / (n * (n - 1))
    assert np.abs(together - share).max() < 5 * math.sqrt(share * (1 - share) / draws)
