"""Retrieval: average precision, recall and whitening against loops; what is a positive."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ssl_vit.evaluators import ranking
from ssl_vit.evaluators.intervals import mean_interval
from ssl_vit.evaluators.ranking import (
    RECALLS,
    Ranked,
    by_labels,
    by_pairs,
    first_ranked,
    itself,
    last_of_equals,
    rank_queries,
)
from ssl_vit.evaluators.whitening import Whitening
from tests.unit.feature_sets import normal

CPU = torch.device("cpu")


def loop_ranked(gallery, queries, relevant, excluded=None) -> Ranked:
    """One query after the other, by the definitions; cosines are all different."""
    precision, first, positives = [], [], []
    for q, query in enumerate(queries):
        cosines = [
            float(query @ image) / math.sqrt(float(query @ query) * float(image @ image))
            for image in gallery
        ]
        order = sorted(range(len(gallery)), key=lambda i: -cosines[i])
        order = [i for i in order if excluded is None or not excluded[q][i]]
        found, sums, at = 0, 0.0, 0
        for rank, i in enumerate(order, 1):
            if relevant[q][i]:
                found += 1
                sums += found / rank
                at = at or rank
        precision.append(sums / found if found else math.nan)
        first.append(at)
        positives.append(found)
    made = torch.tensor(precision, dtype=torch.float64), torch.tensor(first)
    return Ranked(*made, torch.tensor(positives))


def same(one: Ranked, two: Ranked) -> None:
    torch.testing.assert_close(one.precision, two.precision, equal_nan=True, rtol=1e-9, atol=1e-9)
    assert torch.equal(one.first, two.first)
    assert torch.equal(one.positives, two.positives)


@pytest.mark.parametrize("cells", [1, 70, 1 << 22])
def test_ranks_are_those_of_a_loop(cells, monkeypatch):
    """Whatever fits into a chunk; one query has no positive."""
    monkeypatch.setattr(ranking, "_CELLS", cells)
    monkeypatch.setattr(ranking, "_BANK_ROWS", 7)
    gallery, queries = normal(31, 6), normal(9, 6, seed=1)
    labels, asked = torch.arange(31) % 4, torch.arange(9) % 5
    relevant = by_labels(asked, labels)
    found = rank_queries([gallery[:, :2], gallery[:, 2:]], [queries[:, :2], queries[:, 2:]],
                         relevant, CPU)  # fmt: skip
    same(found, loop_ranked(gallery, queries, asked[:, None] == labels))
    metrics = found.metrics()
    assert int((found.positives == 0).sum()) == 1
    usable = found.positives > 0
    assert metrics["map"] == pytest.approx(100 * float(found.precision[usable].mean()))
    for k in RECALLS:
        share = float((found.first[usable] <= k).double().mean())
        assert metrics[f"recall@{k}"] == pytest.approx(100 * share)


@pytest.mark.parametrize("grouped", [False, True])
def test_leave_one_out_leaves_out_the_image_or_its_group(grouped):
    points, labels = normal(24, 5), torch.arange(24) % 3
    groups = torch.arange(24) // 6 if grouped else None
    excluded = itself(groups, 24)
    found = rank_queries([points], [points], by_labels(labels, labels), CPU, excluded)
    out = torch.eye(24).bool() if groups is None else groups[:, None] == groups
    same(found, loop_ranked(points, points, labels[:, None] == labels, out))
    # Without it each image is its own first neighbour, and recall is perfect.
    whole = rank_queries([points], [points], by_labels(labels, labels), CPU)
    assert whole.metrics()["recall@1"] == 100 > found.metrics()["recall@1"]


def test_the_first_of_some_queries_are_those_of_the_ranking():
    """Without what is left out, and no more than there are."""
    gallery, groups = normal(12, 6), torch.arange(12) // 4
    rows, excluded = torch.tensor([5, 0, 11]), itself(groups, 12)
    cosines = (
        torch.nn.functional.normalize(gallery)[rows] @ torch.nn.functional.normalize(gallery).T
    )
    for k in (3, 20):
        places, found = first_ranked([gallery], [gallery], rows, k, CPU, excluded)
        assert places.shape == (3, min(k, 8))
        for row, answer in enumerate(places.tolist()):
            others = [i for i in range(12) if groups[i] != groups[rows[row]]]
            expected = sorted(others, key=lambda i: -float(cosines[row, i]))
            assert answer == expected[:k]
        torch.testing.assert_close(found, cosines.gather(1, places))


def test_of_equal_cosines_the_order_of_images_does_not_matter():
    """As scikit-learn has it; a collapsed encoder finds what chance does."""
    gallery = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1], [0, 1], [1, 0]])
    labels, query = torch.tensor([1, 0, 1, 0, 0, 1]), torch.tensor([[1.0, 0.2]])
    found = rank_queries([gallery], [query], by_labels(torch.ones(1).long(), labels), CPU)
    cosines = torch.nn.functional.normalize(gallery) @ query[0]
    wanted = average_precision_score(labels == 1, cosines)
    assert float(found.precision[0]) == pytest.approx(wanted)
    for order in (torch.arange(60), torch.arange(60).flip(0)):
        alike, classes = torch.ones(60, 4), (torch.arange(60) // 30)[order]
        chance = rank_queries([alike], [alike[:1]], by_labels(classes[:1], classes), CPU)
        assert chance.metrics()["map"] == pytest.approx(50)
    values = torch.tensor([[3.0, 3, 2, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    assert last_of_equals(values).tolist() == [[1, 1, 2, 5, 5, 5], [4, 4, 4, 4, 4, 5]]


def test_images_that_share_a_label_are_positives():
    ours = torch.tensor([[1.0, 0, math.nan], [0, 0, 1]])
    theirs = torch.tensor([[1.0, 1, 0], [0, 1, math.nan], [math.nan, 0, 1]])
    assert by_labels(ours, theirs)(torch.arange(2)).tolist() == [
        [True, False, False],
        [False, False, True],
    ]
    unknown = by_labels(torch.tensor([-1, 2]), torch.tensor([-1, 2]))(torch.arange(2))
    assert unknown.tolist() == [[False, False], [False, True]]


def test_pairs_are_positives():
    relevant = by_pairs(torch.tensor([2, 0, 2]), torch.tensor([1, 3, 0]), 4)
    assert relevant(torch.tensor([0, 1, 2])).int().tolist() == [
        [0, 0, 0, 1],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
    ]


# --- whitening ------------------------------------------------------------------------------------


def loop_ledoit_wolf(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Shrunk covariance by the formulas of Ledoit and Wolf (2004), image by image."""
    n, d = rows.shape
    centred = rows - rows.mean(0)
    covariance = sum(np.outer(x, x) for x in centred) / n
    mean = np.trace(covariance) / d
    target = mean * np.eye(d)
    distance = ((covariance - target) ** 2).sum() / d
    spread = sum(((np.outer(x, x) - covariance) ** 2).sum() for x in centred) / d / n**2
    share = min(spread, distance) / distance
    return (1 - share) * covariance + share * target, share


@pytest.mark.parametrize("n", [8, 400])
def test_whitened_features_have_the_shrunk_covariance_undone(n):
    """Also with fewer images than channels."""
    scales = torch.tensor([5.0, 2, 1, 0.5, 0.2, 0.1, 1, 1, 1, 1, 1, 1])
    features = normal(n, 12) * scales + 1
    flat = Whitening.of([features[:, :5], features[:, 5:]])
    rows = torch.nn.functional.normalize(features).double().numpy()
    covariance, share = loop_ledoit_wolf(rows)
    assert flat.shrinkage == pytest.approx(share)
    made = flat([features[:, :5], features[:, 5:]]).double().numpy()
    matrix = flat.matrix.double().numpy()
    np.testing.assert_allclose(matrix.T @ covariance @ matrix, np.eye(12), atol=1e-4)
    np.testing.assert_allclose(made, (rows - rows.mean(0)) @ matrix, atol=1e-4)
    # Cosines do not depend on which whitening it is: those of Mahalanobis.
    inverse = np.linalg.inv(covariance)
    x = rows - rows.mean(0)
    wanted = x @ inverse @ x.T
    np.testing.assert_allclose(made @ made.T, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_features_that_are_all_alike_whiten_to_zeros():
    flat = Whitening.of([torch.ones(9, 4)])
    assert bool(flat([torch.ones(3, 4)]).isfinite().all())


# --- interval -------------------------------------------------------------------------------------


def test_the_interval_of_a_mean():
    values = np.random.RandomState(0).normal(50, 10, 400)
    low, high = mean_interval(values, 0)
    assert high - low == pytest.approx(2 * 1.96 * 10 / 20, rel=0.15)
    assert low < values.mean() < high
    copies = np.repeat(values, 4)
    apart = mean_interval(copies, 0, np.repeat(np.arange(400), 4))
    assert apart[1] - apart[0] == pytest.approx(high - low, rel=0.05)
    # Groups of any size: the mean is over all images of those that are drawn.
    sizes = np.repeat(np.arange(20), np.arange(1, 21))
    assert mean_interval(np.full(len(sizes), 50.0), 0, sizes) == pytest.approx((50, 50))
