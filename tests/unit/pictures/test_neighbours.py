"""Nearest neighbours by cosine, and the picture of them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ssl_vit.common.errors import UserError
from ssl_vit.evaluators import knn
from ssl_vit.evaluators.retrieval import nearest_images
from ssl_vit.pictures.neighbours import neighbours_panel


def features(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@pytest.mark.parametrize("rows", [1 << 16, 4])
@pytest.mark.parametrize("left_out", [False, True])
def test_against_a_loop(monkeypatch, rows, left_out):
    """In one chunk and in several."""
    monkeypatch.setattr(knn, "_BANK_ROWS", rows)
    bank, own = features(11), torch.tensor([7, 0, 10])
    queries = bank[own] if left_out else features(3, seed=1)
    places, cosines = nearest_images(queries, bank, 4, own if left_out else None)
    for i, query in enumerate(queries):
        expected = {
            j: float(F.cosine_similarity(query, row, dim=0))
            for j, row in enumerate(bank)
            if not (left_out and j == own[i])
        }
        best = sorted(expected, key=lambda j: -expected[j])[:4]
        assert places[i].tolist() == best
        assert cosines[i].tolist() == pytest.approx([expected[j] for j in best], abs=1e-6)


def test_a_query_is_left_out_by_its_place_not_by_its_looks():
    bank = torch.ones(6, 3)
    bank[5] = torch.tensor([1.0, 0, 0])
    places, cosines = nearest_images(bank[[2, 4]], bank, 3, torch.tensor([2, 4]))
    assert places.tolist() == [[0, 1, 3], [0, 1, 2]]
    assert cosines.tolist() == [[pytest.approx(1)] * 3] * 2
    everyone, _ = nearest_images(bank[[5]], bank, 5, torch.tensor([5]))
    assert everyone.tolist() == [[0, 1, 2, 3, 4]]


def test_some_queries_have_no_row_of_their_own():
    bank = features(5)
    places, _ = nearest_images(bank[:2], bank, 3, torch.tensor([-1, 1]))
    assert places[0, 0] == 0
    assert 1 not in places[1]
    assert len(nearest_images(bank[:0], bank, 3)[0]) == 0


@pytest.mark.parametrize(("k", "own"), [(0, None), (6, None), (5, torch.tensor([0, 1]))])
def test_refusals(k, own):
    bank = features(5)
    with pytest.raises(UserError, match=rf"--k is {k}; images to find .* are [45]"):
        nearest_images(bank[:2], bank, k, own)


def test_panel():
    """A row a query: places, frames and marks where they belong."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 100, 120, 3), dtype=np.uint8)
    shown = rng.integers(0, 255, (2, 3, 100, 120, 3), dtype=np.uint8)
    cosines = torch.tensor([[0.99, 0.5, -0.25], [0.9, 0.8, 0.7]])
    same = torch.tensor([[True, False, True], [False, True, True]])

    def cell(picture, row, column):
        return picture[16 + 119 * row :, 4 + 124 * column :][:100, :120]

    plain = neighbours_panel(images, shown, cosines, None)
    framed = neighbours_panel(images, shown, cosines, same)
    assert plain.shape[1] == framed.shape[1] == 4 * 124 + 4
    marks = {}
    for row in range(2):
        for picture in (plain, framed):
            assert (cell(picture, row, 0) == images[row]).all()
        for column in range(3):
            one = cell(framed, row, column + 1)
            assert (cell(plain, row, column + 1) == shown[row, column]).all()
            assert (one[20:-4, 4:-20] == shown[row, column][20:-4, 4:-20]).all()
            frame = one[50, 0].tolist()
            assert frame == one[-1, 60].tolist() == one[0, 60].tolist() == one[50, -1].tolist()
            white = (one[:20, -20:] == 255).all(-1)
            marks.setdefault(bool(same[row, column]), set()).add((tuple(frame), white.tobytes()))
    assert len(marks[True]) == len(marks[False]) == 1
    (colours, shapes) = zip(*marks[True], *marks[False], strict=True)
    assert len(set(colours)) == len(set(shapes)) == 2
    strip = plain[116:130, 128:248]  # below the first neighbour
    assert strip.min() < 100
    assert plain[116:130, 4:124].min() == 255  # nothing below the query
