"""Metrics against scikit-learn, intervals against theory, and what cannot be judged."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    roc_auc_score,
    top_k_accuracy_score,
)

from ssl_vit.common.errors import UserError
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.intervals import Ranking, accuracy_interval, mean_precision_interval
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.scores import Prediction, accuracy, check_labels, score_predictions

NAMES = tuple(f"class {i}" for i in range(8))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predicted(guesses: torch.Tensor) -> Prediction:
    return Prediction("cls", "k=20", guesses, {"k": 20})


def classes_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (400, 8) that know something of the truth (400,)."""
    truth = torch.arange(400) % 7  # no image of the last class
    return normal(400, 8) + 1.5 * torch.nn.functional.one_hot(truth, 8), truth


def labels_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with ties (200, 4), truth (200, 4) with unknowns; the last label has one outcome."""
    truth = (normal(200, 4, seed=1) > 0.8).float()
    scores = (normal(200, 4, seed=2) + 1.2 * truth).mul(4).round()
    truth[normal(200, 4, seed=3) > 1] = torch.nan
    truth[:, 3] = truth[:, 3] * 0
    return scores, truth


# --- classes ------------------------------------------------------------------------------------


def test_accuracies_and_confusion_are_scikit_learns():
    scores, truth = classes_case()
    score = score_predictions(predicted(scores.topk(5).indices), truth, NAMES, seed=0)
    for k in (1, 5):
        theirs = top_k_accuracy_score(truth, scores.numpy(), k=k, labels=range(8))
        assert score.metrics[f"top{k}"] == pytest.approx(100 * theirs)
    assert (score.value, score.top1) == (score.metrics["top1"],) * 2
    assert 40 < score.top1 < score.metrics["top5"] < 99
    table = confusion_matrix(truth, scores.argmax(1), labels=range(8))
    assert score.confusion == table.tolist()
    assert table[7].sum() == 0 < table[:, 7].sum()
    expected = {f"class {c}": 100 * table[c, c] / table[c].sum() for c in range(7)}
    assert score.per_class == pytest.approx(expected)
    assert score.details == {"k": 20}


def test_the_interval_of_an_accuracy_is_the_binomials():
    """By the normal approximation: p +- 1.96 sqrt(p (1 - p) / n)."""
    for n, right in ((400, 300), (5000, 1000)):
        correct = np.arange(n) < right
        p = right / n
        half = 196 * math.sqrt(p * (1 - p) / n)
        low, high = accuracy_interval(correct, seed=0)
        assert (low, high) == pytest.approx((100 * p - half, 100 * p + half), abs=0.15 * half)
        assert accuracy_interval(correct, seed=0) == (low, high) != accuracy_interval(correct, 1)


def test_the_interval_of_an_accuracy_is_that_of_drawn_images():
    """The binomial stands for drawing images again and counting."""
    correct = np.arange(60) < 45
    random = np.random.default_rng(0)
    drawn = [100 * random.choice(correct, 60).mean() for _ in range(4000)]
    expected = np.percentile(drawn, (2.5, 97.5))
    assert accuracy_interval(correct, 0) == pytest.approx(tuple(expected), abs=1.7)


def test_accuracy_counts_the_first_and_the_first_five():
    guesses = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0], [1, 2, 0]])
    labels = torch.tensor([0, 0, 0, 3])
    assert accuracy(guesses, labels) == 25.0
    assert accuracy(guesses, labels, top=2) == 50.0
    assert accuracy(guesses, labels, top=5) == 75.0


def test_no_confusion_beyond_a_hundred_classes():
    for n, there in ((100, True), (101, False)):
        truth = torch.arange(n)
        score = score_predictions(predicted(truth[:, None]), truth, None, seed=0)
        assert (score.confusion is not None) is there
        assert score.per_class[str(n - 1)] == 100.0


# --- several labels -----------------------------------------------------------------------------


def test_precision_and_area_are_scikit_learns():
    """Of the labels with both outcomes, on the images where they are known."""
    scores, truth = labels_case()
    score = score_predictions(predicted(scores), truth, NAMES[:4], seed=0)
    precision, area = [], []
    for label in range(3):
        known = ~truth[:, label].isnan()
        pair = truth[known, label].numpy(), scores[known, label].numpy()
        precision.append(100 * average_precision_score(*pair))
        area.append(100 * roc_auc_score(*pair))
    assert score.metrics == pytest.approx({"map": np.mean(precision), "auroc": np.mean(area)})
    assert score.per_class == pytest.approx(dict(zip(NAMES, precision, strict=False)))
    assert list(score.per_class) == ["class 0", "class 1", "class 2"]
    assert score.details == {"k": 20, "left_out": ["class 3"]}
    assert score.confusion is None
    assert score.interval[0] < score.metrics["map"] < score.interval[1]


def test_a_ranking_gives_average_precision_of_any_weights():
    """scikit-learn's, with ties and unknowns; drawn n times is standing there n times."""
    scores, truth = (t[:, 0].double().numpy() for t in labels_case())
    known = ~np.isnan(truth)
    ranking = Ranking.of(scores, truth)
    counts = np.random.default_rng(0).integers(0, 3, len(scores))
    for weight in (np.ones(len(scores), dtype=int), counts):
        pair = truth[known].repeat(weight[known]), scores[known].repeat(weight[known])
        found = ranking.average_precision(weight)
        assert found == pytest.approx(average_precision_score(*pair))
    assert ranking.average_precision((truth == 0).astype(int)) is None
    assert ranking.average_precision((truth == 1).astype(int)) is None


def test_the_interval_of_mean_precision_is_that_of_drawn_images():
    """Against resampling with scikit-learn; whole images are drawn, with all their labels."""
    scores, truth = (t[:, :1].double().numpy().repeat(2, 1) for t in labels_case())
    found = mean_precision_interval(scores, truth, seed=0)
    known = ~np.isnan(truth[:, 0])
    random, drawn = np.random.default_rng(0), []
    for _ in range(300):
        pick = random.integers(0, len(truth), len(truth))
        pick = pick[known[pick]]
        drawn.append(100 * average_precision_score(truth[pick, 0], scores[pick, 0]))
    assert found == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=2.5)
    assert found[1] - found[0] > 15
    assert mean_precision_interval(scores, truth, seed=0) == found
    assert mean_precision_interval(scores, truth, seed=1) != found


# --- written and read ---------------------------------------------------------------------------


def test_a_score_reads_back_what_was_written():
    scores, truth = classes_case()
    for case in ((scores.topk(5).indices, truth), labels_case()):
        score = score_predictions(predicted(case[0]), case[1], NAMES, seed=0)
        text = json.dumps(dataclasses.asdict(score), allow_nan=False)
        assert Score(**json.loads(text)) == score
        assert isinstance(score.interval, tuple)


# --- what is refused ----------------------------------------------------------------------------


def made_set(labels: object) -> FeatureSet:
    values = torch.as_tensor(labels)
    return FeatureSet({"cls": normal(len(values), 4)}, values, 0, torch.arange(len(values)))


NAN = math.nan


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([0, 1, -1, -1], [0, 1], "the training set has no label for 2 of 4 images"),
        ([0, 1], [0, -1, 1], "the validation set has no label for 1 of 3 images"),
        ([2, 2, 2], [2, 2], "all training images are of class 'class 2'; at least two"),
        ([0, 1, 1], [1, 5], "validation has images of 'class 5'; training has none of them"),
        ([0, 1], [2, 3, 4, 5, 6], "of 'class 2', 'class 3', 'class 4' and 2 more; training"),
        ([0, 1], [[0.0, 1.0]], "the training set has one class an image, the validation set sev"),
        ([[0.0, 1.0]], [0, 1], "the training set has several labels an image, the validation"),
        ([[0.0], [1.0]], [[0.0, 1.0]], "the training set has 1 labels, the validation set 2"),
        ([[NAN], [NAN]], [[1.0]], "the training set has no known label"),
        ([[0.0], [1.0]], [[NAN]], "the validation set has no known label"),
        ([[0.0, 1.0], [NAN, 1.0]], [[0.0, 1.0]], "no label has both outcomes in the training set"),
        ([[0.0], [1.0]], [[1.0], [NAN]], "no label has both outcomes in the validation set"),
    ],
)
def test_sets_that_do_not_fit_are_refused(train, val, message):
    with pytest.raises(UserError, match=message) as caught:
        check_labels(made_set(train), made_set(val), NAMES)
    assert "\n" not in str(caught.value)


def test_sets_that_fit_pass():
    check_labels(made_set([0, 1, 2]), made_set([1, 1]), NAMES)
    check_labels(made_set([[0.0, 1.0], [1.0, NAN]]), made_set([[0.0, NAN], [1.0, NAN]]), None)


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(UserError, match="no label for 1 of 2 images"):
        score_predictions(predicted(torch.zeros(2, 1).long()), torch.tensor([0, -1]), None, 0)
    with pytest.raises(UserError, match="no label has both outcomes in the validation set"):
        score_predictions(predicted(torch.zeros(2, 1)), torch.tensor([[1.0], [NAN]]), None, 0)
