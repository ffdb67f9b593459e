"""Health numbers of known matrices, k-NN against a loop, and the honesty of the linear probe."""

import math

import pytest
import torch
from torch.nn import functional as F

from ssl_vit.config import UserError
from ssl_vit.evaluators import knn
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.knn import accuracy, knn_classify
from ssl_vit.evaluators.linear import LinearProtocol, fit_heads, linear_probe
from ssl_vit.evaluators.scores import knn_scores, linear_scores
from ssl_vit.seeds import fold
from ssl_vit.training.health import Alarm, effective_rank, feature_spread, health


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n: int, classes: int, width: int, noise: float, seed: int) -> tuple:
    """Points around one centre a class; the centres are always the same."""
    labels = torch.arange(n) % classes
    centres = normal(classes, width, seed=1000)
    return centres[labels] + noise * normal(n, width, seed=seed), labels


# --- health -------------------------------------------------------------------------------------


def test_the_effective_rank_of_known_matrices():
    """1 on a line, d for equal singular values, the entropy's exponential between them."""
    assert effective_rank(torch.outer(normal(50), normal(8))) == pytest.approx(1, abs=1e-3)
    orthogonal = torch.linalg.qr(normal(50, 8))[0]
    assert effective_rank(3 * orthogonal) == pytest.approx(8, rel=1e-3)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = [0.5, 0.25, 0.125, 0.125]
    expected = math.exp(-sum(s * math.log(s) for s in shares))
    assert effective_rank(orthogonal[:, :4] * values) == pytest.approx(expected, rel=1e-3)
    assert effective_rank(normal(5000, 16)) == pytest.approx(16, rel=0.01)


def test_the_spread_of_known_features():
    """1 on the whole sphere, 0 when collapsed, whatever the length of the features."""
    even = normal(5000, 32)
    assert feature_spread(even) == pytest.approx(1, abs=0.02)
    assert feature_spread(even * 100) == pytest.approx(feature_spread(even), rel=1e-6)
    assert feature_spread(normal(1, 32).expand(50, -1)) == pytest.approx(0, abs=1e-6)
    # Half at one axis, half at another: deviation 1/2 in two dimensions of four, times sqrt(4).
    axes = torch.eye(4)[[0, 1] * 10]
    assert feature_spread(axes) == pytest.approx(2 * (0.5 + 0.5) / 4, rel=1e-6)


def test_health_survives_what_is_dead():
    found = health(torch.zeros(10, 4))
    assert list(found) == ["feature_std", "rankme"]
    assert all(math.isfinite(v) for v in found.values())


# --- k-NN ---------------------------------------------------------------------------------------


def knn_by_loop(bank, bank_labels, query, k: int, temperature: float) -> list[float]:
    """Votes of one query, by the definition."""
    cosines = [float(query @ row / query.norm() / row.norm()) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
    votes = [0.0] * (int(bank_labels.max()) + 1)
    for i in nearest:
        votes[int(bank_labels[i])] += math.exp(cosines[i] / temperature)
    return votes


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("classes", [3, 8])
def test_knn_is_the_loop_of_its_definition(classes, temperature):
    """For every k at once, bank not normalised; classes best first, at most five."""
    bank, labels = normal(40, 6) * normal(40, 1, seed=3).exp(), torch.arange(40) % classes
    queries = normal(15, 6, seed=1)
    found = knn_classify(bank, labels, queries, (1, 5, 20, 40), temperature)
    assert list(found) == [1, 5, 20, 40]
    for k, predicted in found.items():
        assert predicted.shape == (15, min(5, classes))
        for query, row in zip(queries, predicted.tolist(), strict=True):
            votes = knn_by_loop(bank, labels, query, k, temperature)
            voted = sorted(range(classes), key=lambda c, votes=votes: -votes[c])
            # Classes without a vote are tied, in any order.
            real = [c for c in voted if votes[c] > 0][:5]
            assert row[: len(real)] == real


def test_near_neighbours_outvote_many_far_ones():
    """Two close ones of class 0 against three far ones of class 1: weights decide, not counts."""
    angles = torch.tensor([0.05, 0.1, 1.2, 1.25, 1.3])
    bank = torch.stack([angles.cos(), angles.sin()], 1)
    query = torch.tensor([[1.0, 0.0]])
    found = knn_classify(bank, torch.tensor([0, 0, 1, 1, 1]), query, (5,))
    assert found[5].tolist() == [[0, 1]]
    flat = knn_classify(bank, torch.tensor([0, 0, 1, 1, 1]), query, (5,), temperature=100.0)
    assert flat[5].tolist() == [[1, 0]]


@pytest.mark.parametrize("cells", [1, 100, 333])
def test_chunks_do_not_change_the_votes(cells, monkeypatch):
    bank, labels, queries = normal(60, 8), torch.arange(60) % 7, normal(31, 8, seed=1)
    whole = knn_classify(bank, labels, queries, (3, 10))
    monkeypatch.setattr(knn, "_CELLS", cells)
    parts = knn_classify(bank, labels, queries, (3, 10))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_more_neighbours_than_images_are_all_of_them():
    bank, labels, queries = normal(10, 4), torch.arange(10) % 3, normal(5, 4, seed=1)
    found = knn_classify(bank, labels, queries, (10, 500))
    assert torch.equal(found[10], found[500])


def test_knn_with_very_many_classes():
    """As many classes as images; each image finds itself."""
    bank = normal(2000, 16)
    found = knn_classify(bank, torch.arange(2000), bank, (1, 5))
    assert found[1][:, 0].tolist() == list(range(2000))
    assert accuracy(found[5], torch.arange(2000)) == 100.0


def test_accuracy_counts_the_first_and_the_first_five():
    predicted = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0], [1, 2, 0]])
    labels = torch.tensor([0, 0, 0, 3])
    assert accuracy(predicted, labels) == 25.0
    assert accuracy(predicted, labels, top=2) == 50.0
    assert accuracy(predicted, labels, top=5) == 75.0


def test_knn_scores_leave_out_what_the_set_cannot_fill():
    points, labels = blobs(30, 3, 8, 0.1, seed=0)
    queries, truth = blobs(12, 3, 8, 0.1, seed=1)
    train, val = FeatureSet({"mean": points}, labels, 0), FeatureSet({"mean": queries}, truth, 0)
    assert [(s.setting, s.top1) for s in knn_scores(train, val)] == [("k=10", 100.0), ("k=20", 100)]
    with pytest.raises(UserError, match="the training set has 30 images"):
        knn_scores(train, val, (31,))
    with pytest.raises(UserError, match="the validation set has no labels"):
        knn_scores(train, FeatureSet({"mean": queries}, torch.full((12,), -1), 0))


# --- the linear probe ---------------------------------------------------------------------------

QUICK = LinearProtocol(epochs=10, warmup_share=0.1)


def test_separable_classes_are_separated():
    """Whatever the scale and offset of the features, since a BatchNorm comes first."""
    points, labels = blobs(400, 5, 16, 0.3, seed=0)
    queries, truth = blobs(200, 5, 16, 0.3, seed=1)
    for scale, offset in ((1, 0), (0.01, 5)):
        result = linear_probe(scale * points + offset, labels, scale * queries + offset)
        assert accuracy(result.predicted, truth) > 98
        assert result.held_out_accuracy[result.chosen] == max(result.held_out_accuracy.values())
        assert set(result.held_out_accuracy) == set(LinearProtocol().learning_rates)


def test_random_labels_cannot_be_predicted():
    """No leak from the queries: on noise the probe is at chance."""
    labels = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(1))
    result = linear_probe(normal(400, 8), labels, normal(400, 8, seed=1), QUICK)
    assert accuracy(result.predicted, truth) == pytest.approx(25, abs=8)


def test_the_rate_does_not_depend_on_the_queries():
    """Queries far away, or absent: the same choice, the same held-out accuracies."""
    points, labels = blobs(300, 5, 8, 1.5, seed=0)
    found = [
        linear_probe(points, labels, queries, QUICK)
        for queries in (normal(50, 8), 1e3 * normal(50, 8, seed=2), normal(0, 8))
    ]
    assert found[0].chosen == found[1].chosen == found[2].chosen
    assert found[0].held_out_accuracy == found[1].held_out_accuracy == found[2].held_out_accuracy


def test_a_query_is_predicted_alone():
    """Statistics of the norm are the training set's, not those of the queries together."""
    points, labels = blobs(300, 5, 8, 1.5, seed=0)
    queries = normal(20, 8)
    together = linear_probe(points, labels, queries, QUICK).predicted
    alone = linear_probe(points, labels, queries[7:8], QUICK).predicted
    assert torch.equal(together[7:8], alone)


def test_the_rate_is_chosen_on_images_that_were_not_trained_on():
    """Labels that can only be memorised: held-out accuracy stays at chance, training's does not."""
    labels = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(0))
    points = normal(60, 200)
    result = linear_probe(points, labels, points, LinearProtocol(epochs=30, warmup_share=0.1))
    assert accuracy(result.predicted, labels) > 95
    assert max(result.held_out_accuracy.values()) < 95


def test_the_same_result_twice():
    """Seeded within; the global generator plays no part. Another seed gives other weights."""
    points, labels = blobs(200, 4, 8, 1.5, seed=0)
    rates = (0.1, 1.0)
    torch.manual_seed(1)
    first = fit_heads(points, labels, 4, rates, QUICK)
    torch.manual_seed(2)
    again = fit_heads(points, labels, 4, rates, QUICK)
    other = fit_heads(points, labels, 4, rates, LinearProtocol(epochs=10, warmup_share=0.1, seed=5))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_heads_side_by_side_are_heads_alone():
    """The same rate gives the same head, whichever others are trained with it."""
    points, labels = blobs(200, 4, 8, 1.5, seed=0)
    rates = (0.03, 0.3, 3.0)
    together = fit_heads(points, labels, 4, rates, QUICK)
    for i, rate in enumerate(rates):
        alone = fit_heads(points, labels, 4, (rate,), QUICK)
        logits = together(points)[:, i]
        torch.testing.assert_close(logits, alone(points)[:, 0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together(points)[:, 0], together(points)[:, 1], atol=0.01)


def test_a_head_is_trained_by_torchs_sgd():
    """The same batches, norm and schedule, with torch's own layers and optimizer."""
    points, labels = blobs(64, 4, 8, 1.5, seed=0)
    protocol = LinearProtocol(epochs=4, warmup_share=0.25, batch_size=16)
    ours = fit_heads(points, labels, 4, (0.5,), protocol)
    # The same draws as inside: initial weights, then one shuffle an epoch.
    generator = torch.Generator().manual_seed(fold(protocol.seed))
    norm, linear = torch.nn.BatchNorm1d(8, affine=False, eps=1e-6), torch.nn.Linear(8, 4)
    linear.weight.data = (torch.randn(8, 4, generator=generator) * 0.01).T.contiguous()
    linear.bias.data.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)
    size = 8  # at least eight batches an epoch
    total, step = 4 * 8, 0
    for _ in range(4):
        order = torch.randperm(64, generator=generator)
        for batch in order.split(size):
            peak = 0.5 * size / 256
            warm, share = step / 8, (step - 8) / (total - 8)
            rate = warm if step < 8 else 0.5 * (1 + math.cos(math.pi * share))
            # torch folds the rate into the step, not into the velocity; so do we.
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.zero_grad()
            F.cross_entropy(linear(norm(points[batch])), labels[batch]).backward()
            optimizer.step()
            step += 1
    # Evaluation by the statistics of all training features.
    standard = (points - points.mean(0)) / (points.var(0) + 1e-6).sqrt()
    logits = linear(standard)
    torch.testing.assert_close(ours(points)[:, 0], logits, atol=1e-5, rtol=1e-4)


def test_linear_scores_refuse_too_small_a_set():
    points, labels = blobs(19, 3, 8, 0.1, seed=0)
    few = FeatureSet({"mean": points}, labels, 0)
    with pytest.raises(UserError, match="the training set has 19 images; a probe needs 20"):
        linear_scores(few, few, QUICK)


# --- the alarm ------------------------------------------------------------------------------------


def test_alarm():
    """Said once when it has lasted, once when it is over; never within the warm-up."""
    alarm = Alarm(after=20, patience=30)
    there = {"asleep": "the teacher sleeps"}
    said = {step: alarm.news(step, there if step <= 100 else {}) for step in range(10, 200, 10)}
    assert {k: v for k, v in said.items() if v} == {
        60: ["step 60: the teacher sleeps"],
        110: ["step 110: no longer: asleep"],
    }


def test_alarm_of_what_comes_and_goes():
    """A concern that is not there at every look has not lasted."""
    alarm = Alarm(after=0, patience=30)
    for step in range(10, 200, 10):
        assert alarm.news(step, {"asleep": "..."} if step % 40 else {}) == []
