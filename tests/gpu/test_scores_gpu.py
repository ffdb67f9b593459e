"""Scores on CUDA: they repeat to the bit, and are the CPU's."""

import pytest
import torch

from ssl_vit.evaluators.knn import knn_classify
from ssl_vit.evaluators.linear import LinearProtocol, fit_linear_heads, linear_probe
from ssl_vit.evaluators.patch_heads import patch_heads_loss
from tests.unit.feature_sets import blobs, normal, tagged, top1

CPU = torch.device("cpu")


def test_k_nn_repeats_and_is_the_cpus(device):
    train, val = blobs(4000, 50, 32, 1.5, 0), blobs(500, 50, 32, 1.5, 1)
    bank, queries = [train.parts["mean"]], [val.parts["mean"]]
    one, two = (knn_classify(bank, train.labels, queries, (10, 200), device) for _ in range(2))
    cpu = knn_classify(bank, train.labels, queries, (10, 200), CPU)
    for k, guesses in one.items():
        assert torch.equal(guesses, two[k])
        # A vote or two may tip by rounding.
        assert (guesses[:, 0] == cpu[k][:, 0]).float().mean() > 0.99


@pytest.mark.parametrize("several", [False, True])
def test_linear_heads_repeat(several, device):
    train = tagged(600, 5, 0) if several else blobs(600, 6, 12, 1.0, 0)
    protocol = LinearProtocol(epochs=1, least_steps=100, batch_size=64)
    points = [("mean", 0.01), ("mean", 0.1)]
    one, two = (fit_linear_heads(train, points, protocol, device)["mean"] for _ in range(2))
    assert one.weight.device.type == device.type
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_the_linear_probe_is_the_cpus(device):
    train, val = blobs(600, 6, 12, 1.0, 0), blobs(600, 6, 12, 1.0, 1)
    (ours,), (theirs,) = (linear_probe(train, val, device=d) for d in (device, CPU))
    assert top1(ours, val.labels) == pytest.approx(top1(theirs, val.labels), abs=1.0)


def test_gradients_of_patch_heads_repeat(device):
    masks, made = torch.randint(0, 21, (16, 56, 56)).to(device), []
    for _ in range(5):
        logits = normal(16, 6, 21, 14, 14).to(device).requires_grad_()
        patch_heads_loss(logits, masks, 255).sum().backward()
        made.append(logits.grad)
    assert all(torch.equal(made[0], other) for other in made[1:])
