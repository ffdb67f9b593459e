"""Projectors: their norms, against torch's own."""

import copy

import pytest
import torch
from torch import nn

from ssl_vit.objectives.heads import BatchNorm, projector


def test_batch_norm_is_torchs():
    """In training and, having no running statistics, in evaluation."""
    own, theirs = BatchNorm(6), nn.BatchNorm1d(6)
    with torch.no_grad():
        for norm in (own, theirs):
            norm.weight.copy_(torch.arange(6) / 3)
            norm.bias.copy_(torch.arange(6) - 2.0)
    x = 3 * torch.randn(10, 6) + 1
    torch.testing.assert_close(own(x), theirs(x))
    torch.testing.assert_close(own.eval()(x), theirs(x))
    assert not own.state_dict().keys() - {"weight", "bias"}


@pytest.mark.parametrize(("norm", "apart"), [("batch", False), ("layer", True)])
def test_rows_of_a_layer_norm_are_apart(norm, apart):
    head, x = projector([4, 8, 3], norm), torch.randn(6, 4)
    assert torch.allclose(head(x)[:2], copy.deepcopy(head)(x[:2]), atol=1e-5) == apart
