"""The linear probe on cached features: heads against torch's own optimizers, the honest choice."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold
from ssl_vit.data.eval_images import EvalImages, eval_batches
from ssl_vit.data.order import Order
from ssl_vit.data.sources import open_source
from ssl_vit.evaluators.features import FeatureSet, pixels
from ssl_vit.evaluators.linear import LinearProtocol, fit_linear_heads, linear_probe
from ssl_vit.evaluators.linear_heads import (
    FeatureNorm,
    HeadOptimizer,
    heads_of,
    linear_heads_loss,
    preconditioner,
)
from ssl_vit.evaluators.selection import (
    NOT_CHOSEN,
    best,
    grid_of,
    quality,
    split_rows,
    usable,
)
from tests.unit.feature_sets import blobs, feature_set, normal, tagged, top1

QUICK = LinearProtocol(epochs=2, least_steps=60, batch_size=64)


# --- heads --------------------------------------------------------------------------------------


def cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / total))


def loop_lars(p, gradient, velocity, lr: float, trust: float):
    """LARS for one tensor, by its definition; vectors are not adapted."""
    if p.ndim > 1 and p.norm() > 0 and gradient.norm() > 0:
        gradient = gradient * (trust * p.norm() / gradient.norm())
    velocity = 0.9 * velocity + gradient
    return p - lr * velocity, velocity


@pytest.mark.parametrize("trust", [0.0, 0.1])
@pytest.mark.parametrize("several", [False, True])
def test_heads_side_by_side_are_heads_one_by_one(trust, several):
    """Two features, three rates, a norm over the batch: each as torch's layers, alone, would be."""
    parts = {"cls": 2 + 3 * normal(96, 6), "mean": normal(96, 4, seed=1)}
    targets = tagged(96, 3, 5).labels if several else torch.arange(96) % 3
    rates = (0.05, 0.5, 2.0)
    points = [(name, rate) for name in parts for rate in rates]
    widths = {name: part.shape[1] for name, part in parts.items()}
    heads = heads_of(points, widths, 3, 11, lambda name: FeatureNorm(widths[name]))
    start = {name: stack.weight.detach()[0].clone() for name, stack in heads.items()}
    optimizer = HeadOptimizer(heads, trust=trust)
    batches = torch.arange(96).split(16)
    for step, rows in enumerate(batches):
        batch = {name: part[rows] for name, part in parts.items()}
        optimizer.step(batch, targets[rows], cosine(step, 6))
    for name, rate in points:
        norm = torch.nn.BatchNorm1d(widths[name], affine=False, eps=1e-6)
        linear = torch.nn.Linear(widths[name], 3)
        linear.weight.data, linear.bias.data = start[name].clone(), torch.zeros(3)
        optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)
        velocity = [torch.zeros_like(p) for p in linear.parameters()]
        for step, rows in enumerate(batches):
            logits, wanted = linear(norm(parts[name][rows])), targets[rows]
            if several:
                known = ~wanted.isnan()
                loss = F.binary_cross_entropy_with_logits(
                    logits[known], wanted[known], reduction="sum"
                ) / len(rows)
            else:
                loss = F.cross_entropy(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            lr = rate * cosine(step, 6)
            if trust:
                for i, p in enumerate(linear.parameters()):
                    p.data, velocity[i] = loop_lars(p.data, p.grad, velocity[i], lr, trust)
            else:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
        i = rates.index(rate)
        torch.testing.assert_close(heads[name].weight[i], linear.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads[name].bias[i], linear.bias, atol=1e-5, rtol=1e-4)
        logits = linear(norm.eval()(parts[name]))
        found = heads[name].logits(parts[name], rate)
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
        assert (linear.weight - start[name]).norm() > 1e-4


def test_a_head_that_diverges_hurts_no_other():
    train = blobs(64, 4, 8, 1.0, 0)
    points = [("mean", 0.1), ("mean", 3e38)]
    heads = heads_of(points, {"mean": 8}, 4, 0)
    alone = heads_of(points[:1], {"mean": 8}, 4, 0)
    for made in (heads, alone):
        optimizer = HeadOptimizer(made)
        for _ in range(8):
            optimizer.step(train.parts, train.labels, 1.0)
    assert not heads["mean"].weight[1].isfinite().all()
    torch.testing.assert_close(heads["mean"].weight[0], alone["mean"].weight[0])
    assert quality(heads["mean"].logits(train.parts["mean"], 3e38), train.labels) == -1


def test_initial_weights_depend_on_seed_and_feature_alone():
    both = heads_of([("cls", 1.0), ("mean", 1.0)], {"cls": 400, "mean": 400}, 10, 3)
    alone = heads_of([("mean", 2.0)], {"mean": 400}, 10, 3)
    other = heads_of([("mean", 2.0)], {"mean": 400}, 10, 4)
    assert torch.equal(both["mean"].weight, alone["mean"].weight)
    assert not torch.equal(both["mean"].weight, both["cls"].weight)
    assert not torch.equal(other["mean"].weight, alone["mean"].weight)
    assert float(alone["mean"].weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert float(alone["mean"].bias.detach().abs().max()) == 0


def test_unknown_labels_teach_nothing():
    logits = normal(6, 2, 3).requires_grad_()
    targets = tagged(6, 3, 0).labels
    targets[2], targets[3, 1] = math.nan, math.nan
    gradient = torch.autograd.grad(linear_heads_loss(logits, targets), logits)[0]
    expected = (logits.sigmoid() - targets[:, None].nan_to_num()) / 6
    known = ~targets[:, None].isnan().expand_as(logits)
    torch.testing.assert_close(gradient, torch.where(known, expected, 0.0))
    assert float(gradient[2].abs().max()) == 0


def test_preconditioned_gradients_are_sgd_on_whitened_features():
    """Whole whitening: the same logits as plain SGD in coordinates of unit covariance."""
    points = normal(200, 6) @ normal(6, 6, seed=1)
    norm, targets = FeatureNorm.of(points), torch.arange(200) % 3
    flat = preconditioner([points[:, :2], points[:, 2:]], norm, 1.0)
    values, axes = torch.linalg.eigh(flat)
    root = (axes * values.sqrt()) @ axes.T
    torch.testing.assert_close(root @ root, flat, rtol=1e-3, atol=1e-3)
    white = norm(points) @ root
    torch.testing.assert_close(white.T @ white / 200, torch.eye(6), rtol=0, atol=0.01)
    ours, theirs = (heads_of([("mean", 0.5)], {"mean": 6}, 3, 0) for _ in range(2))
    with torch.no_grad():
        theirs["mean"].weight.copy_(ours["mean"].weight @ root.inverse())
    for heads, features, precondition in (
        (ours, norm(points), {"mean": flat}),
        (theirs, white, None),
    ):
        optimizer = HeadOptimizer(heads, precondition=precondition)
        for _ in range(5):
            optimizer.step({"mean": features}, targets, 1.0)
    made = ours["mean"].logits(norm(points), 0.5)
    torch.testing.assert_close(made, theirs["mean"].logits(white, 0.5), rtol=1e-3, atol=1e-3)
    assert float(made.std()) > 0.05


def test_exact_statistics_of_features():
    points = 3 + 5 * normal(50, 4)
    made = FeatureNorm.of(points)(points)
    torch.testing.assert_close(made.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std(0), torch.ones(4), atol=1e-5, rtol=0)
    assert FeatureNorm.of(points[:1])(points[:1]).tolist() == [[0.0] * 4]


# --- the choice -----------------------------------------------------------------------------------


def test_the_split_takes_of_each_class_alike():
    labels = torch.tensor([0] * 200 + [1] * 100 + [2] * 50 + [3])
    shuffled = labels[torch.randperm(351, generator=torch.Generator().manual_seed(0))]
    kept, held = split_rows(shuffled, 0.1, 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(351))
    assert torch.bincount(shuffled[held]).tolist() == [20, 10, 5]
    again, other = split_rows(shuffled, 0.1, 0), split_rows(shuffled, 0.1, 1)
    assert torch.equal(again[1], held)
    assert not torch.equal(other[1], held)


@pytest.mark.parametrize(
    ("labels", "possible"),
    [
        (torch.arange(20) % 4, True),
        (torch.arange(19) % 3, False),
        (torch.arange(48) % 10, False),
        (torch.arange(50) % 10, True),
        (torch.ones(20, 3), True),
        (torch.ones(19, 3), False),
    ],
)
def test_nothing_is_held_out_of_too_few(labels, possible):
    assert (split_rows(labels, 0.1, 0) is not None) == possible
    assert split_rows(labels, 0.0, 0) is None


def test_quality_of_classes_and_of_labels():
    assert quality(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 75
    # Label 0: ranks 1 and 3 of three known; 1 perfect; 2 never there, 3 unknown, 4 always there.
    scores = torch.tensor([[4.0, 1, 0, 0, 0], [3, 2, 0, 0, 0], [2, -1, 0, 0, 0], [9, -2, 0, 0, 0]])
    n = math.nan
    truth = torch.tensor([[1, 1, 0, n, 1], [0, 1, 0, n, 1], [1, 0, 0, n, 1], [n, 0, 0, n, 1]])
    expected = 100 * ((1 + 2 / 3) / 2 + 1) / 2
    assert quality(scores, truth) == pytest.approx(expected)
    assert math.isnan(quality(scores, torch.zeros(4, 5)))
    assert quality(scores.where(scores < 9, n), truth) == -1


def test_ties_go_to_the_narrow_feature_and_the_low_setting():
    grid = grid_of({"cls4": 8, "cls+mean": 4, "cls": 2, "mean": 2}, (1.0, 0.1))
    assert [p[0] for p in grid[::2]] == ["cls", "mean", "cls+mean", "cls4"]
    assert [p[1] for p in grid[:2]] == [0.1, 1.0]
    assert best(dict.fromkeys(grid, 50.0)) == ("cls", 0.1)
    assert best(dict.fromkeys(grid, 50.0) | {("cls4", 0.1): 51.0}) == ("cls4", 0.1)
    assert best(dict.fromkeys(grid, math.nan)) is None
    assert best({}) is None


def test_features_that_there_are():
    wanted = ("cls", "cls+mean", "cls4")
    for there, expected in (
        ({"cls", "mean", "cls+mean"}, ("cls", "cls+mean")),
        ({"mean"}, ("mean",)),
        ({"pooled"}, ("pooled",)),
        ({"pixels"}, ("pixels",)),
    ):
        assert usable(wanted, there.__contains__) == expected
    assert usable(("cls4",), {"cls", "mean"}.__contains__) == ("cls",)
    with pytest.raises(UserError, match="cls4; the encoder gives none"):
        usable(("cls4",), set().__contains__)


# --- the probe ------------------------------------------------------------------------------------


def test_separable_classes_are_separated():
    """Whatever the scale and offset of the features, since they are standardised."""
    train, val = blobs(400, 5, 16, 0.3, seed=0), blobs(200, 5, 16, 0.3, seed=1)
    for scale, offset in ((1, 0), (0.01, 5)):
        sets = [feature_set(s.labels, mean=scale * s.parts["mean"] + offset) for s in (train, val)]
        (found,) = linear_probe(*sets, QUICK)
        assert top1(found, val.labels) > 98
        assert found.features == "mean"
        held = found.details["held_out_quality"]["mean"]
        assert set(held) == {f"{rate:g}" for rate in QUICK.learning_rates}
        assert held[found.setting.removeprefix("lr=")] == max(held.values())


def test_the_best_feature_is_found():
    """Only the patches' mean tells the classes apart: a feature with it is chosen."""
    sets = []
    for seed in (0, 1):
        made = blobs(400, 5, 16, 0.5, seed)
        sets.append(feature_set(made.labels, cls=normal(400, 16, seed=9 + seed), **made.parts))
    (found,) = linear_probe(*sets, QUICK)
    assert found.features == "cls+mean"
    assert top1(found, sets[1].labels) > 95


def test_random_labels_cannot_be_predicted():
    labels = [torch.randint(4, (400,), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    sets = [feature_set(y, mean=normal(400, 8, seed=s)) for s, y in enumerate(labels)]
    assert top1(linear_probe(*sets, QUICK)[0], labels[1]) == pytest.approx(25, abs=8)


def test_the_choice_does_not_depend_on_the_queries():
    """Other queries, other labels of theirs, none: the same choice and the same predictions."""
    train, val = blobs(300, 5, 8, 1.5, seed=0), blobs(40, 5, 8, 1.5, seed=1)
    (found,) = linear_probe(train, val, QUICK)
    strange = feature_set(torch.full((30,), 4), mean=1e3 * normal(30, 8))
    (alone,) = linear_probe(train, val.take(torch.tensor([7])), QUICK)
    assert torch.equal(alone.guesses, found.guesses[7:8])
    for other in (alone, *linear_probe(train, strange, QUICK)):
        assert other.details == found.details
        assert other.setting == found.setting


def test_the_choice_is_made_on_images_not_learned_from():
    """Labels that can only be memorised: held-out accuracy stays near chance."""
    labels = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(0))
    train = feature_set(labels, mean=normal(60, 200))
    (found,) = linear_probe(train, train, replace(QUICK, least_steps=300))
    assert top1(found, labels) > 95
    assert max(found.details["held_out_quality"]["mean"].values()) < 95


def test_a_given_held_out_set_decides():
    """Its qualities are those reported: none is good by labels that are wrong."""
    train, val = blobs(200, 4, 8, 1.0, seed=0), blobs(50, 4, 8, 1.0, seed=1)
    held = blobs(100, 4, 8, 1.0, seed=2)
    wrong = feature_set((held.labels + 1) % 4, **held.parts)
    (good,), (bad,) = (linear_probe(train, val, QUICK, held_out=h) for h in (held, wrong))
    values = [p.details["held_out_quality"]["mean"].values() for p in (good, bad)]
    assert max(values[0]) > 60
    assert max(values[1]) < 30
    # The grid has then learned from all training images, so the chosen head is one of it.
    rate = float(good.setting.removeprefix("lr="))
    heads = fit_linear_heads(train, [("mean", r) for r in QUICK.learning_rates], QUICK)
    logits = heads["mean"].logits(val.parts["mean"], rate)
    assert torch.equal(logits.topk(4).indices, good.guesses)


def test_the_same_result_twice():
    """Seeded within; the global generators play no part. Another seed gives other weights."""
    train = blobs(200, 4, 8, 1.5, seed=0)
    point = [("mean", 0.3)]
    made = []
    for seed, protocol in ((1, QUICK), (2, QUICK), (1, replace(QUICK, seed=5))):
        torch.manual_seed(seed)
        np.random.seed(seed)
        made.append(fit_linear_heads(train, point, protocol)["mean"].weight)
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2], atol=1e-4)


def test_a_head_is_trained_by_torchs_sgd():
    """The same batches, norm and schedule, with torch's own layer and optimizer."""
    train = blobs(64, 4, 8, 1.5, seed=0)
    protocol = LinearProtocol(4, 1, 16, warmup_share=0.25, whitening=0.0)
    ours = fit_linear_heads(train, [("mean", 0.5)], protocol)["mean"]
    points = train.parts["mean"]
    standard = (points - points.mean(0)) / (points.var(0) + 1e-6).sqrt()
    linear = torch.nn.Linear(8, 4)
    linear.weight.data = heads_of([("mean", 0.5)], {"mean": 8}, 4, 0)["mean"].weight.data[0]
    linear.bias.data.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)
    order, total = Order(64, 16, fold(0, 2)), 4 * 4
    for step in range(total):
        rows = torch.from_numpy(order.part(step, 0)[1])
        rate = step / 4 if step < 4 else cosine(step - 4, total - 4)
        optimizer.param_groups[0]["lr"] = 0.5 * 16 / 256 * rate
        optimizer.zero_grad()
        F.cross_entropy(linear(standard[rows]), train.labels[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(ours.logits(points, 0.5), linear(standard), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("each", [1, 2, 4])
def test_few_images_are_enough(each):
    """No choice, a fixed setting, and details say so."""
    train, val = blobs(5 * each, 5, 16, 0.3, seed=0), blobs(100, 5, 16, 0.3, seed=1)
    (found,) = linear_probe(train, val, replace(QUICK, least_steps=600))
    assert found.details["selection"] == NOT_CHOSEN
    assert found.details["held_out_quality"] == {}
    assert found.setting == "lr=0.01"
    assert top1(found, val.labels) > 90
    with pytest.raises(UserError, match="at least 2 training images"):
        linear_probe(train.take(torch.tensor([0])), val)


def test_several_labels():
    train, val = tagged(500, 6, seed=0), tagged(200, 6, seed=1, unknown=0.0)
    protocol = replace(QUICK, least_steps=300)
    (found,) = linear_probe(train, val, protocol)
    assert found.guesses.shape == (200, 6)
    assert 0 <= float(found.guesses.min()) < float(found.guesses.max()) <= 1
    assert quality(found.guesses, val.labels) > 95
    assert max(found.details["held_out_quality"]["mean"].values()) > 95


def digits() -> list[FeatureSet]:
    sources = [open_source(f"digits:{part}") for part in ("train", "val")]
    return [
        feature_set(
            torch.from_numpy(s.labels), pixels=torch.from_numpy(s.images).float().flatten(1)
        )
        for s in sources
    ]


def small_photographs(folder) -> list[FeatureSet]:
    """CIFAR-10 averaged down to 8 x 8 pixels: 8,000 images to learn from, 2,000 to be judged on."""
    source = open_source(f"tar:{folder}/cifar10/train-000000.tar")
    batches = eval_batches(EvalImages(source, (32, 32), 1.0, 3), 500, 0, False)
    views = [b.views for b in batches]
    small = [F.adaptive_avg_pool2d(v.crops[0].float(), 8) for v in views]
    made = feature_set(
        torch.cat([v.labels for v in views]), pixels=torch.cat([pixels(s)["pixels"] for s in small])
    )
    return [made.take(torch.arange(8000)), made.take(torch.arange(8000, 10000))]


def best_of_sklearn(train: FeatureSet, val: FeatureSet) -> float:
    norm = FeatureNorm.of(train.parts["pixels"])
    x, q = (norm(s.parts["pixels"]).numpy() for s in (train, val))
    fits = [
        LogisticRegression(C=c, max_iter=200).fit(x, train.labels) for c in (0.001, 0.01, 0.1, 1)
    ]
    return max(100 * fit.score(q, val.labels) for fit in fits)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_as_good_as_logistic_regression_on_digits():
    train, val = digits()
    (found,) = linear_probe(train, val)
    assert found.features == "pixels"
    assert top1(found, val.labels) > best_of_sklearn(train, val) - 1.5


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_as_good_as_logistic_regression_on_photographs(shared_data):
    train, val = small_photographs(shared_data)
    (found,) = linear_probe(train, val)
    assert top1(found, val.labels) > best_of_sklearn(train, val) - 1.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"held_out": 1.0}, "held_out is 1; it must lie in [0, 1)"),
        ({"learning_rates": (0.1, 0.0)}, "learning_rates is 0.1 0; it must be above 0"),
        ({"learning_rates": (math.inf,)}, "learning_rates is inf; it must be above 0"),
        ({"learning_rates": ()}, "learning_rates is empty; it must have a value"),
    ],
)
def test_a_protocol_out_of_range_is_refused(given, said):
    """By its fields: options of commands have other names."""
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        LinearProtocol(**given)
