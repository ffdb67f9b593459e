"""Logistic regression: what scikit-learn gives, its strength chosen honestly."""

import logging
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from ssl_vit.common.errors import UserError
from ssl_vit.evaluators.logreg import Logistic, LogregProtocol, logreg_probe
from ssl_vit.evaluators.selection import NOT_CHOSEN, split_rows
from tests.unit.feature_sets import blobs, feature_set, normal, tagged, top1

FEW = LogregProtocol(strengths=(10.0, 0.001, 0.1), features=("mean",))


def standard(train, other):
    mean, std = train.mean(0), train.std(0)
    return ((other - mean) / std).numpy()


def test_probabilities_are_those_of_a_direct_call():
    """Of the chosen strength, on all training images, standardised."""
    train, val = blobs(300, 7, 10, 2.0, seed=0), blobs(80, 7, 10, 2.0, seed=1)
    (found,) = logreg_probe(train, val, FEW)
    points, queries = train.parts["mean"], val.parts["mean"]
    direct = LogisticRegression(C=found.details["C"], max_iter=500)
    direct.fit(standard(points, points), train.labels.numpy())
    expected = torch.from_numpy(direct.predict_proba(standard(points, queries)))
    assert torch.equal(found.guesses, expected.topk(5).indices)
    model = Logistic(train.labels, found.details["C"], 500)
    model.fit(torch.from_numpy(standard(points, points)))
    made = model.probabilities(torch.from_numpy(standard(points, queries)))
    torch.testing.assert_close(made.double(), expected.double(), atol=1e-4, rtol=1e-3)


def test_the_strength_is_the_best_on_what_was_held_out():
    train, val = blobs(300, 4, 30, 4.0, seed=0), blobs(50, 4, 30, 4.0, seed=1)
    (found,) = logreg_probe(train, val, FEW)
    kept, held = split_rows(train.labels, 0.1, 0)
    points = train.parts["mean"]
    scores = {}
    for c in (0.001, 0.1, 10.0):
        fit = LogisticRegression(C=c, max_iter=500)
        fit.fit(standard(points[kept], points[kept]), train.labels[kept].numpy())
        right = fit.score(standard(points[kept], points[held]), train.labels[held].numpy())
        scores[f"{c:g}"] = round(100 * right, 3)
    assert found.details["held_out_quality"]["mean"] == scores
    # Of equal ones the lowest, in whatever order they were given.
    assert found.setting == f"C={max(scores, key=scores.get)}"


def test_equal_strengths_and_a_given_held_out_set():
    train, held = blobs(200, 4, 8, 0.1, seed=0), blobs(60, 4, 8, 0.1, seed=2)
    (found,) = logreg_probe(train, held, FEW, held_out=held)
    assert found.details["held_out_quality"]["mean"] == {"0.001": 100, "0.1": 100, "10": 100}
    assert found.setting == "C=0.001"
    # One that only a strong regularisation gets right: the opposite of the training labels' noise.
    noisy = train.labels.clone()
    flipped = torch.arange(200) % 3 == 0
    noisy[flipped] = (noisy[flipped] + 1) % 4
    wide = feature_set(noisy, mean=torch.cat([train.parts["mean"], normal(200, 300)], 1))
    clean = feature_set(
        held.labels, mean=torch.cat([held.parts["mean"], normal(60, 300, seed=3)], 1)
    )
    (found,) = logreg_probe(wide, clean, FEW, held_out=clean)
    values = found.details["held_out_quality"]["mean"]
    assert values[found.setting.removeprefix("C=")] == max(values.values())
    assert values["0.001"] > values["10"]


def test_a_query_is_predicted_alone():
    train, val = blobs(200, 4, 8, 1.5, seed=0), blobs(30, 4, 8, 1.5, seed=1)
    (together,) = logreg_probe(train, val, FEW)
    (alone,) = logreg_probe(train, val.take(torch.tensor([7])), FEW)
    assert torch.equal(alone.guesses, together.guesses[7:8])
    assert alone.details == together.details


def test_several_labels_are_one_regression_each():
    """Unknown ones are left out; a label that never varies is as it was; C by mean precision."""
    train, val = tagged(400, 5, seed=0), tagged(150, 5, seed=1, unknown=0.0)
    train.labels[:, 3] = 1.0
    train.labels[:, 4] = math.nan
    (found,) = logreg_probe(train, val, FEW)
    points, queries = train.parts["mean"], val.parts["mean"]
    assert found.guesses[:, 3].tolist() == [1.0] * 150
    assert found.guesses[:, 4].tolist() == [0.5] * 150
    for label in range(3):
        known = ~train.labels[:, label].isnan()
        fit = LogisticRegression(C=found.details["C"], max_iter=500)
        fit.fit(standard(points, points[known]), train.labels[known, label].numpy())
        expected = fit.predict_proba(standard(points, queries))[:, 1]
        np.testing.assert_allclose(found.guesses[:, label].numpy(), expected, atol=1e-4)
        assert average_precision_score(val.labels[:, label].numpy(), expected) > 0.9


def test_classes_that_are_missing():
    """Numbers with gaps stay what they are; one class alone is refused."""
    train, val = blobs(120, 3, 8, 0.2, seed=0), blobs(30, 3, 8, 0.2, seed=1)
    gaps = torch.tensor([1, 4, 6])
    train, val = (feature_set(gaps[s.labels], **s.parts) for s in (train, val))
    (found,) = logreg_probe(train, val, FEW)
    assert top1(found, val.labels) == 100
    assert found.guesses.shape == (30, 5)
    one = feature_set(torch.zeros(40).long(), mean=normal(40, 8))
    with pytest.raises(UserError, match="all training images are of one class"):
        logreg_probe(one, val, FEW)


def test_few_images_are_enough():
    train, val = blobs(5, 5, 16, 0.2, seed=0), blobs(50, 5, 16, 0.2, seed=1)
    (found,) = logreg_probe(train, val, FEW)
    assert found.details["selection"] == NOT_CHOSEN
    assert found.setting == "C=1"
    assert top1(found, val.labels) > 90


def test_what_has_not_converged_is_said_in_one_line(caplog, recwarn):
    train, val = blobs(200, 4, 8, 1.5, seed=0), blobs(30, 4, 8, 1.5, seed=1)
    with caplog.at_level(logging.WARNING, "ssl_vit"):
        (found,) = logreg_probe(train, val, replace(FEW, iterations=2))
    assert [r.getMessage() for r in caplog.records] == [
        "logreg on mean: 4 fits stopped after 2 iterations without convergence"
    ]
    assert found.details["not_converged"] == 3
    assert not found.details["chosen_converged"]
    assert not recwarn.list
    caplog.clear()
    logreg_probe(train, val, FEW)
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"strengths": (1.0, 0.0)}, "strengths is 1 0; it must be above 0"),
        ({"strengths": ()}, "strengths is empty; it must have a value"),
        ({"iterations": 0}, "iterations is 0; it must be 1 or more"),
        ({"held_out": -0.5}, "held_out is -0.5; it must lie in [0, 1)"),
    ],
)
def test_a_protocol_out_of_range_is_refused(given, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        LogregProtocol(**given)
