"""k-NN against a loop and scikit-learn, whatever the chunks; leave-one-out; several labels."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from ssl_vit.common.errors import UserError
from ssl_vit.evaluators import knn
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.knn import knn_classify, knn_predictions, largest, nearest_neighbours
from ssl_vit.evaluators.quick_scores import knn_scores
from ssl_vit.evaluators.scores import accuracy

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n: int, classes: int, width: int, noise: float, seed: int) -> tuple:
    """Points around one centre a class; the centres are always the same."""
    labels = torch.arange(n) % classes
    return normal(classes, width, seed=1000)[labels] + noise * normal(n, width, seed=seed), labels


def made_set(labels: torch.Tensor, **parts: torch.Tensor) -> FeatureSet:
    return FeatureSet(parts, labels, 0, torch.arange(len(labels)))


def classify(bank, labels, queries, ks, **options) -> dict[int, torch.Tensor]:
    return knn_classify([bank], labels, [queries], ks, CPU, **options)


def nearest_by_loop(bank, query, k: int, without: int | None = None) -> list[tuple[float, int]]:
    """(cosine, place) of the k nearest, by the definition."""
    cosines = [float(query @ row / query.norm() / row.norm()) for row in bank]
    order = sorted((i for i in range(len(bank)) if i != without), key=lambda i: -cosines[i])
    return [(cosines[i], i) for i in order[:k]]


def votes_by_loop(bank, labels, query, k: int, temperature=0.07, without=None) -> list[float]:
    votes = [0.0] * (int(labels.max()) + 1)
    for cosine, i in nearest_by_loop(bank, query, k, without):
        votes[int(labels[i])] += math.exp(cosine / temperature)
    return votes


def voted(votes: list[float]) -> list[int]:
    """The first five classes, of equal votes the lower."""
    return sorted(range(len(votes)), key=lambda c: (-votes[c], c))[:5]


# --- classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("classes", [3, 8])
def test_knn_is_the_loop_of_its_definition(classes, temperature):
    """For every k at once, bank not normalised; classes best first, at most five."""
    bank, labels = normal(40, 6) * normal(40, 1, seed=3).exp(), torch.arange(40) % classes
    queries = normal(15, 6, seed=1)
    found = classify(bank, labels, queries, (1, 5, 20, 40), temperature=temperature)
    assert list(found) == [1, 5, 20, 40]
    for k, predicted in found.items():
        expected = [voted(votes_by_loop(bank, labels, q, k, temperature)) for q in queries]
        assert predicted.tolist() == expected


@pytest.mark.parametrize("k", [1, 10, 50])
def test_knn_is_scikit_learns_with_these_weights(k):
    """An implementation by others, with weights exp((1 - distance) / T)."""
    bank, labels = blobs(300, 7, 12, 2.0, seed=0)
    queries = normal(200, 12, seed=5)
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.double().numpy(), labels.numpy())
    found = classify(bank, labels, queries, (k,))[k]
    assert found[:, 0].tolist() == theirs.predict(queries.double().numpy()).tolist()
    assert len(set(found[:, 0].tolist())) == 7


def test_near_neighbours_outvote_many_far_ones():
    """Two close ones of class 0 against three far ones of class 1: weights decide, not counts."""
    angles = torch.tensor([0.05, 0.1, 1.2, 1.25, 1.3])
    bank, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert classify(bank, labels, query, (5,))[5].tolist() == [[0, 1]]
    assert classify(bank, labels, query, (5,), temperature=100.0)[5].tolist() == [[1, 0]]


def test_features_of_several_parts_are_those_side_by_side():
    bank, queries, labels = normal(60, 9), normal(20, 9, seed=1), torch.arange(60) % 7
    parts = knn_classify(bank.split(4, 1), labels, queries.split(4, 1), (3, 10), CPU)
    whole = classify(bank, labels, queries, (3, 10))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_more_neighbours_than_images_are_all_of_them():
    bank, labels, queries = normal(10, 4), torch.arange(10) % 3, normal(5, 4, seed=1)
    found = classify(bank, labels, queries, (10, 500))
    assert torch.equal(found[10], found[500])


def test_knn_with_very_many_classes():
    """As many classes as images; each image finds itself."""
    bank = normal(2000, 16)
    found = classify(bank, torch.arange(2000), bank, (1, 5))
    assert found[1][:, 0].tolist() == list(range(2000))
    assert accuracy(found[5], torch.arange(2000)) == 100.0


def test_features_that_are_no_numbers_are_near_to_nothing():
    bank, labels = blobs(40, 4, 8, 0.1, seed=0)
    bank[0], bank[1] = torch.nan, torch.inf
    queries, truth = blobs(20, 4, 8, 0.1, seed=1)
    assert accuracy(classify(bank, labels, queries, (5,))[5], truth) == 100.0


# --- chunks and ties ----------------------------------------------------------------------------


def whole_numbers(n: int, width: int, seed: int) -> torch.Tensor:
    """Rows of +-1: all of one length, and their products exact, so that ties are ties."""
    return normal(n, width, seed=seed).sign()


@pytest.mark.parametrize(("rows", "cells"), [(7, 64), (25, 100), (1000, 333), (7, 1 << 20)])
@pytest.mark.parametrize("made", [normal, whole_numbers])
def test_chunks_change_nothing(made, rows, cells, monkeypatch):
    """Of the bank and of the queries, with many ties and without; nor do they of several labels."""
    bank, queries, labels = made(60, 4, seed=0), made(31, 4, seed=1), torch.arange(60) % 7
    outcomes = (normal(60, 3, seed=2) > 0).float()
    one_chunk = [classify(bank, y, queries, (3, 10)) for y in (labels, outcomes)]
    alone = classify(bank, labels, bank, (3, 10), first=0)
    monkeypatch.setattr(knn, "_CELLS", cells)
    monkeypatch.setattr(knn, "_BANK_ROWS", rows)
    for y, whole in zip((labels, outcomes), one_chunk, strict=True):
        chunked = classify(bank, y, queries, (3, 10))
        for k in whole:
            torch.testing.assert_close(chunked[k], whole[k], rtol=1e-5, atol=1e-6)
    chunked = classify(bank, labels, bank, (3, 10), first=0)
    assert all(torch.equal(alone[k], chunked[k]) for k in alone)


@pytest.mark.parametrize("rows", [3, 1000])
def test_of_equal_neighbours_the_first_are_taken(rows, monkeypatch):
    """A bank of copies: place decides. Unit vectors along axes, so that products are exact."""
    monkeypatch.setattr(knn, "_BANK_ROWS", rows)
    bank = torch.eye(2)[[1, 0, 0, 1, 0, 0, 1, 0]]
    cosines, index = nearest_neighbours([bank], torch.tensor([[1.0, 0.0]]), 6)
    assert index.tolist() == [[1, 2, 4, 5, 7, 0]]
    assert cosines.tolist() == [[1, 1, 1, 1, 1, 0]]


def test_the_largest_are_those_of_a_stable_sort():
    """Few distinct values, every k, rows with and without ties among the taken."""
    draws = torch.Generator().manual_seed(0)
    tied = torch.randint(0, 4, (50, 30), generator=draws).float()
    values = torch.cat([tied, normal(10, 30)])
    expected, places = values.sort(dim=1, descending=True, stable=True)
    for k in (1, 2, 10, 29, 30):
        found, where = largest(values, k)
        assert torch.equal(found, expected[:, :k])
        assert torch.equal(where, places[:, :k])


# --- leave-one-out ------------------------------------------------------------------------------


def test_leave_one_out_is_the_loop_without_the_image():
    bank, labels = blobs(40, 4, 6, 1.5, seed=0)
    found = knn_predictions(made_set(labels, mean=bank), None, (1, 7, 39, 40), ("mean",), CPU)
    assert [p.setting for p in found] == ["k=1", "k=7", "k=39"]
    for prediction, k in zip(found, (1, 7, 39), strict=True):
        expected = [
            voted(votes_by_loop(bank, labels, bank[i], k, without=i)) for i in range(len(bank))
        ]
        assert prediction.guesses[:, 0].tolist() == [row[0] for row in expected]
        assert prediction.details["leave_one_out"] is True


def test_a_copy_elsewhere_is_a_neighbour():
    """Left out is the image at its own place, not what looks like it."""
    points = normal(10, 6).repeat(2, 1)
    found = knn_predictions(made_set(torch.arange(20), mean=points), None, (1,), ("mean",), CPU)
    assert found[0].guesses[:, 0].tolist() == [*range(10, 20), *range(10)]


# --- several labels -----------------------------------------------------------------------------


def test_several_labels_are_weighted_means_of_known_ones():
    bank, queries = normal(30, 5), normal(8, 5, seed=1)
    labels = (normal(30, 4, seed=2) > 0).float()
    labels[normal(30, 4, seed=3) > 0.5] = torch.nan
    labels[1:, 3] = torch.nan  # known of one image only, so of few queries' neighbours
    labels[0, 3] = 1
    for k, found in classify(bank, labels, queries, (1, 10)).items():
        for query, row in zip(queries, found.tolist(), strict=True):
            for label, score in enumerate(row):
                pairs = [
                    (math.exp(cosine / 0.07), float(labels[i, label]))
                    for cosine, i in nearest_by_loop(bank, query, k)
                    if not labels[i, label].isnan()
                ]
                known = [y for y in labels[:, label].tolist() if not math.isnan(y)]
                expected = (
                    sum(w * y for w, y in pairs) / sum(w for w, _ in pairs)
                    if pairs
                    else sum(known) / len(known)
                )
                assert score == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- of feature sets ----------------------------------------------------------------------------


def test_predictions_of_each_feature_and_each_possible_k():
    points, labels = blobs(30, 3, 8, 0.1, seed=0)
    queries, _ = blobs(12, 3, 8, 0.1, seed=1)
    train = made_set(labels, cls=points, mean=normal(30, 5))
    val = made_set(torch.full((12,), -1), cls=queries, mean=normal(12, 5, seed=1))
    found = knn_predictions(train, val, (10, 20, 100), ("cls", "cls+mean"), CPU)
    named = [(p.features, p.setting) for p in found]
    assert named == [(f, s) for f in ("cls", "cls+mean") for s in ("k=10", "k=20")]
    joined = classify(train.feature("cls+mean"), labels, val.feature("cls+mean"), (10,))
    assert torch.equal(found[2].guesses, joined[10])
    with pytest.raises(UserError, match=r"k is \(31,\); the training set has 30 images"):
        knn_predictions(train, val, (31,), ("cls",), CPU)
    with pytest.raises(UserError, match=r"k is \(30,\); the training set has 30 images"):
        knn_predictions(train, None, (30,), ("cls",), CPU)
    with pytest.raises(UserError, match="training set has no label for 12 of 12 images"):
        knn_predictions(val, None, (3,), ("cls",), CPU)


def test_scores_while_pretraining():
    points, labels = blobs(30, 3, 8, 0.1, seed=0)
    queries, truth = blobs(12, 3, 8, 0.1, seed=1)
    train, val = made_set(labels, mean=points), made_set(truth, mean=queries)
    assert [(s.setting, s.top1) for s in knn_scores(train, val)] == [("k=10", 100.0), ("k=20", 100)]
    with pytest.raises(UserError, match="the validation set has no label for 12 of 12 images"):
        knn_scores(train, made_set(torch.full((12,), -1), mean=queries))
