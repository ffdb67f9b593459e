"""Sinkhorn-Knopp against its closed form, at extremes, and what it leaves to do."""

import pytest
import torch

from ssl_vit.objectives.sinkhorn import sinkhorn_knopp, unevenness


def test_many_iterations_use_every_prototype_equally_often():
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    once, often = sinkhorn_knopp(logits, 1), sinkhorn_knopp(logits, 200)
    torch.testing.assert_close(often.sum(1), torch.ones(40).double())
    torch.testing.assert_close(often.sum(0), torch.full((5,), 8.0).double())
    left = [unevenness(found.mean(0)) for found in (often, once, logits.softmax(1))]
    assert left[0] < 1e-6 < left[1] < left[2]


def test_one_iteration_by_hand():
    """Columns to one sum, then rows to 1."""
    mass = torch.tensor([[1.0, 3.0], [1.0, 1.0]]).double()
    expected = torch.tensor([[0.5, 0.75], [0.5, 0.25]]).double()
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn_knopp(mass.log(), 1), expected)


@pytest.mark.parametrize("shift", [-1000.0, 500.0])
def test_sharp_outputs_neither_overflow_nor_vanish(shift):
    """exp() of float32 ends at 88."""
    logits = torch.tensor([[50.0, 0.0], [0.0, 40.0], [-45.0, 0.0]]) + shift
    found = sinkhorn_knopp(logits)
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_a_prototype_that_nobody_has_gets_nothing():
    logits = torch.tensor([[0.0, -500.0], [1.0, -500.0]])
    assert sinkhorn_knopp(logits).tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_unevenness_is_a_share_of_the_mass():
    """One prototype of four takes all: three quarters would have to move."""
    assert unevenness(torch.tensor([0.0, 1, 0, 0])).item() == pytest.approx(0.75)
    assert unevenness(torch.full((4,), 0.25)).item() == 0
