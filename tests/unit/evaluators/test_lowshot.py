"""Subsets of labelled images: how many, which, and several seeds together."""

import pytest
import torch

from ssl_vit.common.errors import UserError
from ssl_vit.evaluators.lowshot import over_seeds, subsets
from ssl_vit.evaluators.score import Score

LABELS = torch.tensor([0] * 50 + [2] * 30 + [3] * 5)[torch.randperm(85)]


def counted(rows: torch.Tensor) -> list[int]:
    return LABELS[rows].bincount(minlength=4).tolist()


def test_so_many_of_each_class():
    """Each row once, ascending; a class number without images asks for none."""
    for per_class in (1, 5):
        rows = subsets(LABELS, per_class, None, seed=0)
        assert counted(rows) == [per_class, 0, per_class, per_class]
        assert rows.tolist() == sorted(set(rows.tolist()))


@pytest.mark.parametrize(
    ("fraction", "counts"), [(0.1, [5, 0, 3, 1]), (0.01, [1, 0, 1, 1]), (1.0, [50, 0, 30, 5])]
)
def test_a_share_of_each_class_is_at_least_one(fraction, counts):
    assert counted(subsets(LABELS, None, fraction, seed=0)) == counts


def test_a_subset_is_a_function_of_the_seed():
    torch.manual_seed(0)
    first = subsets(LABELS, 5, None, seed=3)
    torch.manual_seed(1)
    assert torch.equal(first, subsets(LABELS, 5, None, seed=3))
    assert not torch.equal(first, subsets(LABELS, 5, None, seed=4))
    assert set(subsets(LABELS, 2, None, seed=3).tolist()) < set(first.tolist())


def test_every_image_is_chosen_as_often():
    """Of 2 classes of 20, 5 each: over 400 seeds each image 100 times, sigma 8.7."""
    labels = torch.arange(40) % 2
    rows = torch.cat([subsets(labels, 5, None, seed) for seed in range(400)])
    chosen = rows.bincount(minlength=40)
    assert chosen.sum() == 4000
    assert chosen.min() > 100 - 4 * 8.7
    assert chosen.max() < 100 + 4 * 8.7


def test_several_labels_an_image():
    rows = subsets(torch.zeros(40, 3), None, 0.25, seed=0)
    assert len(set(rows.tolist())) == 10
    assert not torch.equal(rows, subsets(torch.zeros(40, 3), None, 0.25, seed=1))


@pytest.mark.parametrize(
    ("labels", "per_class", "fraction", "message"),
    [
        (LABELS, 6, None, "class 'three' has 5 images; 6 per class are asked"),
        (LABELS, None, None, "needs images per class or a fraction; given: None, None"),
        (LABELS, 1, 0.1, "needs images per class or a fraction; given: 1, 0.1"),
        (LABELS, 0, None, "0 images per class; at least 1"),
        (LABELS, None, 1.5, "a fraction of 1.5; above 0, at most 1"),
        (LABELS - 1, 1, None, "needs the label of every image"),
        (torch.zeros(9, 2), 1, None, "have no single class; give a share of all images"),
    ],
)
def test_what_cannot_be_had_is_refused(labels, per_class, fraction, message):
    with pytest.raises(UserError, match=message):
        subsets(labels, per_class, fraction, 0, ("zero", "one", "two", "three"))


def test_scores_over_seeds():
    """Means, the deviation of a sample, and each seed's own numbers."""
    common = {"x": 10.0, "y": 20.0}
    scores = [
        Score("cls", s, {"top1": t, "top5": 90.0}, (t - 2, t + 4), common | {"x": t}, [[n]], {})
        for s, t, n in (("lr=1", 60.0, 5), ("lr=3", 70.0, 7))
    ]
    mean = over_seeds(scores)
    assert mean.metrics == {"top1": 65.0, "top5": 90.0}
    assert tuple(mean.interval) == (63.0, 69.0)
    assert mean.details["standard_deviation"] == {"top1": pytest.approx(50**0.5), "top5": 0.0}
    assert [s["metrics"]["top1"] for s in mean.details["seeds"]] == [60.0, 70.0]
    assert [s["setting"] for s in mean.details["seeds"]] == ["lr=1", "lr=3"]
    assert mean.setting == "chosen for each"
    assert mean.per_class == {"x": 65.0, "y": 20.0}
    assert mean.confusion == [[12]]
    one = over_seeds(scores[:1])
    assert (one.setting, one.details["standard_deviation"]["top1"]) == ("lr=1", 0.0)
